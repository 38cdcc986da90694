"""Runs an unmodified DeepSpeed script with largebatch registered.

deepspeed --module largebatch your_script.py --deepspeed_config ds_config.json
"""

from __future__ import annotations

import os
import runpy
import sys

from largebatch.register import register

USAGE = """usage: deepspeed [launcher options] --module largebatch SCRIPT.py [arguments of the script]

Registers the JSON types LARS, LAMB, NLAMB, NNLAMB with DeepSpeed and runs SCRIPT.py as it is."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; argv without the program name."""
    argv = sys.argv[1:] if argv is None else argv
    # the launcher puts --local_rank=N first; the script gets it as it would without us
    launcher_arguments = [a for a in argv[:1] if a.startswith("--local_rank")]
    rest = argv[len(launcher_arguments) :]
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if rest else 2
    script = rest[0]
    if not os.path.isfile(script):
        print(f"largebatch: error: {script!r} is not a file; expected the path of a Python script", file=sys.stderr)
        return 2
    register()
    sys.argv = [script, *launcher_arguments, *rest[1:]]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
