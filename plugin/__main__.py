"""The ``largebatch`` command, and ``deepspeed --module largebatch``, which runs an unmodified DeepSpeed script.

deepspeed --module largebatch your_script.py --deepspeed_config ds_config.json
largebatch doctor | recipes | plan | run | convert | study [arguments]
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys

from largebatch.engine.register import register

USAGE = """usage: largebatch COMMAND [arguments]; COMMAND --help says which
"""

USAGE_OF_SCRIPTS = """
deepspeed [options] --module largebatch SCRIPT.py|PACKAGE.MODULE [arguments]
runs a DeepSpeed script as it is, with LARS, LAMB, NLAMB, NNLAMB and LANS known.
"""

COMMANDS = {
    "doctor": ("largebatch.launch.commands.doctor", "checks this machine, or all of a hostfile, before a run"),
    "recipes": ("largebatch.launch.commands.recipes", "lists, filters and prints the recipes in ds_configs"),
    "plan": ("largebatch.launch.commands.plan", "sizes a large batch: memory, time, a ds_config"),
    "run": ("largebatch.launch.commands.run", "trains, and goes on from the newest checkpoint after a crash"),
    "convert": ("largebatch.launch.commands.convert", "checkpoints to plain PyTorch or back, between optimizers"),
    "study": ("largebatch.launch.commands.study", "trains a grid of optimizers, batches, seeds; table and plots"),
}
"""Name -> (module with ``main(argv) -> exit code``, what it does). Imported only when named."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; argv without the program name."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    # the launcher puts --local_rank=N first; the script gets it as it would without us
    launcher_arguments = [a for a in argv[:1] if a.startswith("--local_rank")]
    rest = argv[len(launcher_arguments) :]
    if not rest or rest[0] in ("-h", "--help"):
        print(
            USAGE + "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()) + "\n" + USAGE_OF_SCRIPTS,
            end="",
        )
        return 0 if rest else 2
    script = rest[0]
    if not os.path.isfile(script):
        sys.path.insert(0, os.getcwd())
        if not is_module(script):
            print(
                f"largebatch: error: {script!r} is neither a file nor a module; expected the path of a Python script, the name of "
                f"a module (package.module), or one of {', '.join(COMMANDS)}",
                file=sys.stderr,
            )
            return 2
        register()
        sys.argv = [script, *launcher_arguments, *rest[1:]]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return 0
    register()
    sys.argv = [script, *launcher_arguments, *rest[1:]]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")
    return 0


def is_module(name: str) -> bool:
    """Whether Python finds a module of this name; its packages are imported for that."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
