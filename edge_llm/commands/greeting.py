"""What `edge-llm up` says when the cluster is ready: what to try, as it can be typed here, and how to stop it.

Owns these sentences. Refuses to know processes.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def own_command() -> str:
    """`edge-llm` as it can be typed where the user is: by its name if that finds it, else by its place."""
    if shutil.which("edge-llm"):
        return "edge-llm"
    place = Path(sys.executable).with_name("edge-llm")
    near = Path(os.path.relpath(place))
    return str(place if str(near).startswith("..") else near)


def greeting(url: str, model: str, levels: set[str], can_split: bool, stop: str, which: str = "") -> str:
    """`levels`: what the workers promise of their exactness; `stop`: what ends the cluster; `which`: the option that
    names the model to other commands, unless it is the default."""
    question = '{"role": "user", "content": "What is a prefill?"}'
    ours = ', "edge_llm": {"mode": "split"}' if can_split else ""
    body = f'{{"messages": [{question}], "stream": true{ours}}}'
    hint = (
        f"Not verified yet whether this build is exact here: `{own_command()} verify{which}` measures it, "
        "and answers name the level after the next start.\n"
        if "unverified" in levels
        else ""
    )
    return (
        f"\nThe cluster is ready: {model} at {url}/v1\nTry it in another terminal:\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{body}'\n\n"
        f"or `{own_command()} chat --url {url}`. {hint}{stop} stops the cluster."
    )
