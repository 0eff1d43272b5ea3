"""What a board's processor is called, and whether the image runs there.

Pure. Owns the words. The image is compiled for ARMv8.2 with dotprod and fp16 (edge_llm/image/wheel.py) and refuses a
board without them at its start; here that is known from the core's name before anything is applied. Names of AMD and
Intel are not known: nothing hangs on them.
"""

from __future__ import annotations

import difflib
import re
from typing import Final

# Of a Raspberry Pi 5; what components/pi5 is for.
PI5: Final = "cortex-a76"
_OTHER_WORDS: Final = {
    "pi5": PI5,
    "pi-5": PI5,
    "raspberry-pi-5": PI5,
    "bcm2712": PI5,
    "pi4": "cortex-a72",
    "pi-4": "cortex-a72",
    "raspberry-pi-4": "cortex-a72",
    "bcm2711": "cortex-a72",
    "pi3": "cortex-a53",
    "pi-3": "cortex-a53",
    "raspberry-pi-3": "cortex-a53",
    "bcm2837": "cortex-a53",
}
# ARMv8.0, and one of 8.2 without dotprod.
_TOO_OLD: Final = frozenset({*(f"cortex-a{number}" for number in ("34", "35", "53", "57", "72", "73")), "carmel"})
_GOOD: Final = frozenset(
    {
        *(f"cortex-a{number}" for number in ("55", "65", "65ae", "75", "76", "76ae", "77", "78", "78ae", "78c")),
        *(f"cortex-a{number}" for number in ("510", "520", "710", "715", "720", "725")),
        *(f"cortex-x{number}" for number in ("1", "1c", "2", "3", "4", "925")),
        *(f"neoverse-{name}" for name in ("e1", "n1", "n2", "n3", "v1", "v2", "v3")),
    }
)


def processor(word: str) -> str:
    """One word for one core, however it is written: `Cortex A76`, `a76` and `pi5` are cortex-a76. Raises ValueError for
    one that the image does not run on."""
    name = re.sub(r"[ _]+", "-", word.strip().lower())
    name = _OTHER_WORDS.get(name) or (f"cortex-{name}" if re.fullmatch(r"[ax][0-9]{1,3}[a-z]{0,2}", name) else name)
    if name in _TOO_OLD:
        raise ValueError(
            f"{name} has no dotprod, which the image is compiled for (Raspberry Pi 5, Cortex-A76 and newer): a worker "
            "would refuse to start there, as on every Raspberry Pi before 5. Leave the board out; alone it runs from a "
            "checkout (`make up`)"
        )
    return name


def nearest(name: str) -> str | None:
    """The core that was meant by a word that is none; None: the word is good, or was not given. Empty: who knows."""
    if not name or name in _GOOD:
        return None
    return next(iter(difflib.get_close_matches(name, sorted(_GOOD), n=1, cutoff=0.75)), "")
