import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic  # noqa: F401  cyclopts behaves differently where it is loaded
import pytest
from safetensors import SafetensorError

from mmkd.command.settings import given_values, parse, resolved, run, save_settings, setting
from mmkd.train.pretrain import PretrainSettings


@dataclass(kw_only=True)
class Schedule:
    """How long a recipe trains."""

    GROUP: ClassVar[str] = "schedule"
    epochs: int = setting(3, "passes")


@dataclass(kw_only=True)
class Example(Schedule):
    """An example recipe."""

    output: Path = setting(help="where")
    learning_rate: float = setting(1e-4, "peak")
    quiet: bool = setting(False, "no bars")
    recipe: Literal["default", "paper"] = setting("default", "which")
    teachers: list[str] = setting(factory=list, help="names")
    losses: dict[str, float] = setting(factory=lambda: {"task": 1.0}, help="weights")
    limit: int | None = setting(None, "most")
    stage: dict[str, Any] = setting(factory=dict, help="free")


def test_command_line_overrides_yaml_and_yaml_overrides_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1e-5\nepochs: 7\nlosses: {task: 0.5, relational: 1e0}\nteachers: [a, b]\n")
    settings = parse(Example, ["--config", str(config), "--epochs", "9", "--output", "out", "--losses.relational", "2"])
    assert settings.learning_rate == 1e-5
    assert settings.epochs == 9
    assert settings.losses == {"task": 0.5, "relational": 2.0}
    assert settings.teachers == ["a", "b"]
    assert settings.output == Path("out")


def test_forms_of_values():
    argv = ["--output=o", "--quiet", "--learning-rate", "1e-3", "--teachers", "a, b", "--losses.x", "2"]
    settings = parse(Example, [*argv, "--limit", "none", "--stage.epochs", "4"])
    assert settings.quiet is True
    assert settings.learning_rate == 1e-3
    assert settings.teachers == ["a", "b"]
    assert settings.losses == {"task": 1.0, "x": 2.0}
    assert settings.limit is None
    assert settings.stage == {"epochs": "4"}
    assert parse(Example, ["--output", "o", "--quiet", "false"]).quiet is False
    assert parse(Example, ["--output", "o", "--limit", "4"]).limit == 4
    assert parse(Example, ["--output", "o", "--learning_rate", "-1"]).learning_rate == -1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--output", "o", "--learning_rte", "1"],
            "did you mean 'learning_rate'.*allowed: epochs",
        ),
        ([], "--output is required: where"),
        (["--output", "o", "--epochs", "many"], "epochs must be int, not 'many'"),
        (["--output", "o", "--epochs", "1.5"], "epochs must be int"),
        (["--output", "o", "--recipe", "papr"], "did you mean 'paper'.*allowed: default, paper"),
        (["--output", "o", "--quiet=maybe"], '--quiet: unable to convert "maybe" into bool'),
        (["--output"], "--output requires an argument"),
        (["output", "o"], r"Unused Tokens: .'output', 'o'"),
        (["--output", "o", "--epochs.x", "1"], "unknown setting --epochs.x"),
        (["--output", "o", "--losses", "3"], '--losses: unable to convert "3" into dict'),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(Example, argv)


def test_yaml_faults_name_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("epohcs: 3\n")
    with pytest.raises(ValueError, match=r"c\.yaml.*did you mean 'epochs'"):
        parse(Example, ["--config", str(config)])
    config.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(Example, ["--config", str(config)])
    config.write_text("- a\n")
    with pytest.raises(ValueError, match="must hold"):
        parse(Example, ["--config", str(config)])
    with pytest.raises(FileNotFoundError, match="no such file"):
        parse(Example, ["--config", str(tmp_path / "none.yaml")])


def test_saved_settings_read_back_equal(tmp_path):
    settings = parse(Example, ["--output", "o", "--teachers", "a,b", "--limit", "3", "--losses.feature", "2"])
    assert settings.losses == {"task": 1.0, "feature": 2.0}
    save_settings(settings, tmp_path / "s.yaml")
    assert resolved(parse(Example, ["--config", str(tmp_path / "s.yaml")])) == resolved(settings)


def test_help_lists_every_setting_in_its_group_and_required_ones_first(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Example, ["--help"])
    printed = capsys.readouterr().out
    assert "An example recipe." in printed
    assert all(f"--{name}" in printed for name in (field.name for field in dataclasses.fields(Example)))
    places = [printed.index(text) for text in ("required:", "--output", "schedule:", "--epochs", "command:", "--check")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileExistsError(17, "File exists", "a/b"), 1, "mmkd x: error: a/b: File exists\n"),
        (
            OSError(28, "No space left on device"),
            1,
            "mmkd x: error: o: No space left on device; free some and try again\n",
        ),
        (SafetensorError("I/O error"), 1, "mmkd x: error: I/O error\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume\n"),
    ],
)
def test_run_says_what_the_system_refused(monkeypatch, capsys, error, code, line):
    def fails(_settings):
        raise error

    monkeypatch.setattr("sys.argv", ["x", "--output", "o"])
    with pytest.raises(SystemExit, match=str(code)):
        run(Example, fails)
    assert capsys.readouterr().err == line


def test_run_turns_user_errors_into_one_line(monkeypatch, capsys):
    def fails(_settings):
        raise FileNotFoundError("no pairs there")

    monkeypatch.setattr("sys.argv", ["x", "--output", "o"])
    with pytest.raises(SystemExit, match="1"):
        run(Example, fails)
    assert capsys.readouterr().err == "mmkd x: error: no pairs there\n"
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit, match="2"):
        run(Example, fails)


def test_a_command_opens_more_files_than_the_usual_limit(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the system allows no more")

    counts = []

    def opens(_settings):
        with contextlib.ExitStack() as opened:
            for k in range(1100):
                opened.enter_context((tmp_path / f"{k % 2}").open("w"))
            counts.append(k + 1)

    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path / "o")])
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        run(Example, opens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert counts == [1100]


def test_a_later_file_merges_mappings_into_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("output: o\nlosses: {task: 0.5, feature: 2}\nteachers: [a]\n")
    (tmp_path / "b.yaml").write_text("losses: {feature: 3}\nteachers: [b]\n")
    settings = parse(Example, ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert settings.losses == {"task": 0.5, "feature": 3.0}
    assert settings.teachers == ["b"]


def test_check_only_checks(monkeypatch, capsys):
    def never(_settings):
        raise AssertionError("ran")

    monkeypatch.setattr("sys.argv", ["x", "--epochs", "3", "--check"])
    with pytest.raises(SystemExit, match="0"):
        run(Example, never)
    monkeypatch.setattr("sys.argv", ["x", "--epohcs", "3", "--check"])
    with pytest.raises(SystemExit, match="2"):
        run(Example, never)
    assert "did you mean 'epochs'" in capsys.readouterr().err


@dataclass
class Positional:
    """One value may come without its name."""

    folder: Path = setting(help="what it is about", positional=True)
    dry_run: bool = setting(False, "only look")


def test_one_value_may_come_without_its_name(capsys):
    assert parse(Positional, ["a/b", "--dry-run"]) == Positional(Path("a/b"), True)
    assert parse(Positional, ["--dry-run", "false", "a"]) == Positional(Path("a"), False)
    assert parse(Positional, ["--folder", "a"]) == Positional(Path("a"), False)
    with pytest.raises(ValueError, match=r"Unused Tokens: .'b'"):
        parse(Positional, ["a", "b"])
    with pytest.raises(ValueError, match="--folder is required"):
        parse(Positional, [])


@dataclass
class SeveralPositional:
    """Two may come without their names, the last of them a list."""

    index: Path = setting(help="what is searched", positional=True)
    query: list[str] = setting(help="what for", positional=True, whole=True)
    k: int = setting(10, "answers")
    names: list[str] | None = setting(None, "names")


def test_words_without_a_name_are_taken_whole_and_a_letter_has_one_dash():
    several = parse(SeveralPositional, ["a", "lung, left", "b", "-k", "3", "--names", "x,y"])
    assert several == SeveralPositional(Path("a"), ["lung, left", "b"], 3, ["x", "y"])
    assert parse(SeveralPositional, ["--k", "2", "a", "b", "--names", "none"]) == SeveralPositional(Path("a"), ["b"], 2)
    with pytest.raises(ValueError, match="--query is required"):
        parse(SeveralPositional, ["a"])


def test_a_packaged_config_is_known_by_its_name():
    assert given_values(PretrainSettings, ["--config", "pretrain_paper"])["warmup_steps"] == 2000
    with pytest.raises(FileNotFoundError, match=r"did you mean 'pretrain_paper'.*packaged: .*distill_paper"):
        given_values(PretrainSettings, ["--config", "pretrain_papr"])
