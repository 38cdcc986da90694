"""Flags in one style over all commands; earlier spellings work, with a note."""

import re

import pytest

from largebatch.__main__ import COMMANDS, main
from largebatch.launch.commands import doctor, plan, recipes, study
from largebatch.launch.recipe.flags import parse_arguments

AS_DEEPSPEED_SPELLS_THEM = {"--deepspeed_config", "--local_rank", "--master_addr", "--master_port", "--ssh_port"}
STUDY = ["--model", "lenet", "--batches", "480", "--optimizers", "lars"]

EARLIER = (
    (parse_arguments, ["--deepspeed_config", "x", "--zero_stage=2"], {"zero_stage": 2}, "--zero_stage is written --zero-stage now"),
    (doctor.parse_arguments, ["--need_memory", "3"], {"need_memory": 3}, "--need_memory is written --need-memory now"),
    (plan.parse_arguments, ["--samples", "9"], {"num_samples": 9}, "--samples is written --num-samples now"),
    (recipes.parse_arguments, ["--data", "mnist"], {"data": "mnist"}, "--data is written --data-set now"),
    (study.parse_arguments, [*STUDY, "--data", "mnist", "--data-folder", "d"], {"data_set": "mnist", "data": "d"}, "--data-folder is"),
)  # fmt: skip


@pytest.mark.parametrize("parse, argv, values, note", EARLIER)
def test_earlier_spellings(capsys, monkeypatch, parse, argv, values, note):
    assert vars(parse(argv)).items() >= values.items()
    assert note in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    parse(argv)
    assert not capsys.readouterr().err, "one rank says it"


def test_present_spellings(capsys):
    arguments = study.parse_arguments([*STUDY, "--data-set", "mnist", "--data", "d"])
    assert (arguments.data_set, arguments.data) == ("mnist", "d")
    assert parse_arguments(["--deepspeed_config", "x", "--zero-stage", "2"]).zero_stage == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_one_style(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    flags = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert not {flag for flag in flags if "_" in flag} - AS_DEEPSPEED_SPELLS_THEM


def test_help_is_a_line_a_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
