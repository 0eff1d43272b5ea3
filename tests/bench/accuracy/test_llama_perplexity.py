"""llama-perplexity beside us: asked for the same windows and kernels, and refused when it did others."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.bench.accuracy.llama_perplexity import (
    Asked,
    Said,
    divergence_command,
    divergence_said,
    perplexity_command,
    perplexity_said,
)
from edge_llm.bench.llama_tools import Kernels, UnreadableOutput

TOOL, MODEL, TEXT, LOGITS = Path("tools/llama-perplexity"), Path("m.gguf"), Path("text"), Path("base")
ASKED = Asked(256, 2, 1, Kernels(False, False))
# what the tool printed, of two windows of our own page in two quantizations
PERPLEXITY = """0.12 minutes
       0  39.7339  3.682204  0.258017
     256  43.3283  3.768806  0.180581


"""
DIVERGENCE = """0.10 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      45.8046 ±   11.4359       0.14217 ±    0.06144       0.26472 ±    0.01521     8.490 ±  0.827 %    67.717 ±  4.165 %
   2      50.2163 ±    8.7791       0.14753 ±    0.04365       0.25476 ±    0.00987     8.281 ±  0.603 %    68.110 ±  2.930 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  50.216259 ±   8.779097
Mean PPL(base)                :  43.328518 ±   7.824290
Cor(ln(PPL(Q)), ln(PPL(base))):  97.03%
Mean ln(PPL(Q)/PPL(base))     :   0.147528 ±   0.043650
Mean PPL(Q)/PPL(base)         :   1.158966 ±   0.050589

====== KL divergence statistics ======
Mean    KLD:   0.254760 ±   0.009870
Maximum KLD:   1.300720
Median  KLD:   0.224582
Minimum KLD:   0.003216

====== Token probability statistics ======
Mean    Δp: -2.417 ± 0.498 %
RMS Δp    :  8.281 ± 0.603 %
Same top p: 68.110 ± 2.930 %

"""  # noqa: E501 (as it is printed)


def options(command: list[str]) -> dict[str, str]:
    """Each option with the word that follows it."""
    return {word: after for word, after in zip(command, [*command[1:], ""], strict=True) if word.startswith("-")}


def test_it_is_asked_for_our_windows_one_at_a_time_with_our_kernels() -> None:
    asked = Asked(256, 3, 2, Kernels(False, True, "q8_0"))
    found = options(perplexity_command(TOOL, MODEL, asked, TEXT, LOGITS))
    wanted = {"-m": "m.gguf", "-f": "text", "-c": "256", "-b": "256", "--chunks": "3", "-t": "2", "-tb": "2"}
    assert found == wanted | {
        "--ppl-output-type": "1",
        "--kl-divergence-base": "base",
        "-ctk": "q8_0",
        "-ctv": "f16",
        "-fa": "off",
        "--repack": "",
    }
    alone = options(perplexity_command(TOOL, MODEL, ASKED, TEXT, None))
    assert "--kl-divergence-base" not in alone
    assert "--no-repack" in alone


def test_the_other_model_reads_the_windows_that_the_first_one_left() -> None:
    found = options(divergence_command(TOOL, MODEL, ASKED, LOGITS))
    assert {"--kl-divergence", "--no-repack"} <= found.keys()
    assert (found["--kl-divergence-base"], found["-c"], found["-fa"]) == ("base", "256", "off")
    assert "-f" not in found


def test_llama_cpps_own_choice_of_kernels_is_left_to_it() -> None:
    found = options(perplexity_command(TOOL, MODEL, Asked(256, 2, 1, Kernels(True, False)), TEXT, None))
    assert not {"-fa", "--repack", "--no-repack"} & found.keys()


def test_the_last_line_is_of_all_windows() -> None:
    assert perplexity_said(PERPLEXITY, ASKED) == Said(43.3283)


def test_divergence_and_what_goes_with_it_are_read() -> None:
    said = divergence_said(DIVERGENCE, ASKED)
    assert said.perplexity == 50.216259
    assert said.base_perplexity == 43.328518
    assert said.kl == 0.254760
    assert said.same_top == pytest.approx(0.68110)


@pytest.mark.parametrize("asked", [Asked(256, 3, 1, ASKED.kernels), Asked(512, 2, 1, ASKED.kernels)])
def test_other_windows_than_asked_for_are_refused(asked: Asked) -> None:
    with pytest.raises(UnreadableOutput, match="windows"):
        perplexity_said(PERPLEXITY, asked)


def test_a_divergence_of_other_windows_is_refused() -> None:
    with pytest.raises(UnreadableOutput, match="compared 2 windows, asked for 3"):
        divergence_said(DIVERGENCE, Asked(256, 3, 1, ASKED.kernels))


def test_too_few_tokens_are_said_before_missing_words() -> None:
    begun = DIVERGENCE[: DIVERGENCE.index("======")]
    with pytest.raises(UnreadableOutput, match="statistics of 62 tokens"):
        divergence_said(begun, Asked(64, 2, 1, ASKED.kernels))
    with pytest.raises(UnreadableOutput, match="did not say"):
        divergence_said(begun, ASKED)


def test_silence_is_no_result() -> None:
    with pytest.raises(UnreadableOutput, match="0 windows"):
        perplexity_said("", ASKED)


def test_the_file_of_probabilities_has_16_bits_for_each_word_and_scored_token() -> None:
    header_and_tokens = 8 + 4 + 4 + 4 + 4 * 512
    assert ASKED.logits_bytes(49152) + header_and_tokens == 24_973_316  # what was seen on disk
