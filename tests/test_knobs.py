"""The knobs: where a value comes from, what is refused, and that the README lists every one of them."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kitsune.config import KNOBS, VARIABLES, Config, KitsuneWarning, Options, from_environment, knob_table

README = Path(__file__).parent.parent / "README.md"

# knob: environment text, the value it stands for, another accepted value, a refused value
EXAMPLES = {
    "enabled": ("off", False, True, "maybe"),
    "warmup": ("3", 3, 0, -1),
    "device": ("cuda:1", "cuda:1", "cpu", "gpu"),
    "max_pending_ops": ("50", 50, 1, 0),
    "max_pending_bytes": ("2GB", 2 * 2**30, 4096, "2 parsecs"),
    "gate": ("0", False, True, 3),
    "follow": ("0", False, True, 3),
    "early_reads": ("0", False, True, 3),
    "audit": ("7", 7, 0, -1),
    "fuse": ("0", False, True, 3),
    "numerics": ("BITWISE", "bitwise", "strict", "loose"),
    "fuel": ("7", 7, 0, -1),
    "layouts": ("0", False, True, 3),
    "pool": ("no", False, True, "maybe"),
    "graphs": ("off", False, True, "maybe"),
    "streams": ("2", 2, 1, 0),
    "pages": ("off", False, True, "maybe"),
    "early_starts": ("no", False, True, "sometimes"),
    "warm_start": ("no", False, True, "sometimes"),
    "max_graphs": ("3", 3, 1, 0),
    "graph_memory": ("2GB", 2 * 2**30, 4096, "much"),
    "cache_dir": ("/tmp/k", "/tmp/k", None, 5),
    "tuning": ("OFF", "off", "on", "sometimes"),
    "compile_workers": ("2", 2, None, -1),
    "debug": ("1", 1, 5, 6),
    "dump": ("/tmp/d", "/tmp/d", None, 0),
    "verify": ("yes", True, False, 2),
    "check": ("1", True, False, 2),
}


@pytest.fixture
def config() -> Config:
    return Config({})


def test_every_knob_has_an_example_here():
    assert EXAMPLES.keys() == KNOBS.keys()


def test_attributes_of_config_are_the_rows_of_options():
    assert Config.__annotations__ == Options.__annotations__


def test_options_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.options().warmup = 3


@pytest.mark.parametrize("name", KNOBS)
def test_default_is_accepted_and_shown(config, name):
    assert getattr(config, name) == KNOBS[name].default
    setattr(config, name, KNOBS[name].default)
    assert name in config.show()


@pytest.mark.parametrize("name", KNOBS)
def test_environment_variable_sets_the_knob(name):
    text, value, _, _ = EXAMPLES[name]
    config = Config({KNOBS[name].metadata["variable"]: text})
    assert getattr(config, name) == value
    assert "environment" in next(line for line in config.show().splitlines() if line.startswith(name))


@pytest.mark.parametrize("name", KNOBS)
def test_patch_sets_and_restores(config, name):
    _, value, other, _ = EXAMPLES[name]
    setattr(config, name, value)
    with config.patch(**{name: other}) as patched:
        assert getattr(patched, name) == other
    assert getattr(config, name) == value


@pytest.mark.parametrize("name", KNOBS)
def test_bad_value_is_named_with_what_is_accepted(config, name):
    bad, before = EXAMPLES[name][3], getattr(config, name)
    with pytest.raises(ValueError, match=rf"^{name}={bad!r} is not possible: {name} accepts .+\.$"):
        setattr(config, name, bad)
    with pytest.raises(ValueError, match=name):
        config.patch(**{name: bad})
    assert getattr(config, name) == before


# Any text is the name of a folder.
FOLDERS = ("KITSUNE_CACHE_DIR", "KITSUNE_DUMP")


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v not in FOLDERS])
def test_bad_environment_value_names_the_variable(variable):
    bad = str(EXAMPLES[VARIABLES[variable]][3])
    with pytest.raises(ValueError, match=rf"^{variable}='{bad}' is not possible: the variable accepts .+\.$"):
        Config({variable: bad})


@pytest.mark.parametrize("text", ["0", "false", "OFF", "No"])
def test_words_for_false(text):
    assert Config({"KITSUNE": text}).enabled is False


@pytest.mark.parametrize("text", ["1", "True", "on", "YES"])
def test_words_for_true(text):
    assert Config({"KITSUNE": text}).enabled is True


def test_empty_variable_counts_as_unset():
    assert from_environment({"KITSUNE_WARMUP": "", "KITSUNE_DEVICE": " "}) == {}


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("1024", 1024), ("512MB", 512 * 2**20), ("1.5 GiB", 3 * 2**29), ("4k", 4096), ("8B", 8), ("none", None)],
)
def test_byte_texts(text, n_bytes):
    assert Config({"KITSUNE_MAX_PENDING_BYTES": text}).max_pending_bytes == n_bytes


@pytest.mark.parametrize("bad", ["0", "-1GB", "GB", "1PB"])
def test_byte_texts_that_are_refused(bad):
    with pytest.raises(ValueError, match="a text such as '512MB'"):
        Config({"KITSUNE_MAX_PENDING_BYTES": bad})


def test_unknown_variable_warns_with_the_nearest():
    with pytest.warns(KitsuneWarning, match=r"KITSUNE_WARMUPS\. Did you mean 'KITSUNE_WARMUP'\?"):
        from_environment({"KITSUNE_WARMUPS": "2"})


def test_other_variables_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_environment({"KITSUNEROOT": "/x", "HOME": "/"}) == {}


def test_unknown_option_is_named_with_the_nearest(config):
    with pytest.raises(AttributeError, match=r"no option 'warmpu'\. Did you mean 'warmup'\?"):
        _ = config.warmpu
    with pytest.raises(AttributeError, match="Did you mean 'debug'"):
        config.debugg = 1
    with pytest.raises(TypeError, match="Did you mean 'max_pending_ops'"):
        config.patch(max_pending_op=1)


def test_patch_is_a_decorator_that_may_recurse(config):
    @config.patch(warmup=7)
    def depth(n: int) -> list[int]:
        return [config.warmup, *(depth(n - 1) if n else [])]

    assert depth(2) == [7, 7, 7]
    assert config.warmup == 1


def test_patch_restores_after_an_exception_and_nests(config):
    with pytest.raises(KeyError), config.patch(warmup=2), config.patch(warmup=3, verify=True):
        raise KeyError
    assert (config.warmup, config.verify) == (1, False)


def test_show_names_each_source():
    config = Config({"KITSUNE_WARMUP": "2"})
    config.debug = 1
    with config.patch(verify=True):
        sources = {line.split()[0]: line for line in config.show().splitlines()}
    for name, source in {"warmup": "environment", "debug": "set", "verify": "patch", "enabled": "default"}.items():
        assert f"  {source} " in sources[name]


def test_option_cannot_be_deleted(config):
    with pytest.raises(AttributeError, match="assign its default"):
        del config.warmup


def _import_with(**variables: str) -> subprocess.CompletedProcess[str]:
    program = "import kitsune; print(kitsune.config.warmup)"
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_import_reads_the_environment_and_warns_once():
    done = _import_with(KITSUNE_WARMUP="4", KITSUNE_WARMPU="1")
    assert done.stdout.strip() == "4"
    assert done.stderr.count("KITSUNE_WARMPU") == 1


def test_import_refuses_a_bad_value():
    done = _import_with(KITSUNE_WARMUP="many")
    assert done.returncode != 0
    assert "ValueError: KITSUNE_WARMUP='many' is not possible" in done.stderr


def test_readme_lists_every_knob():
    text = README.read_text()
    table = text.split("<!-- knobs -->")[1].split("<!-- /knobs -->")[0]
    assert table.strip() == knob_table()
