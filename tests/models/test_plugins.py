from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milan_ray.errors import MilanError
from milan_ray.models.registry import get_model
from milan_ray.plugins import load_plugins

SOURCE = """
from torch import nn
from milan_ray.models.registry import register_model
register_model("{name}", lambda weights: nn.Linear(2, 2), ["outputs"])
"""


def test_plugins_builtin_ones_are_always_loaded() -> None:
    load_plugins()
    assert get_model("alexnet/imagenet").layers[0] == "conv1"


def test_plugins_of_a_user_s_own_model_need_no_torchvision_and_override_its_names(tmp_path: Path) -> None:
    """Importing it takes a third of the time in which a worker starts."""
    plugin = tmp_path / "own.py"
    plugin.write_text(SOURCE.format(name="own/net") + SOURCE.format(name="vgg11/imagenet"))
    script = f"""
from milan_ray.stages import descriptions, encodings, exemplars
from milan_ray.models.registry import get_model, match_models
from milan_ray.plugins import load_plugins
import sys
load_plugins([{str(plugin)!r}])
load_plugins([{str(plugin)!r}])
assert get_model("own/net").layers == ("outputs",)
assert "torchvision" not in sys.modules and "torch._dynamo" not in sys.modules
assert match_models("vgg1[13]/imagenet") == ["vgg11/imagenet", "vgg13/imagenet"]
assert "torchvision" in sys.modules
assert get_model("vgg11/imagenet").layers == ("outputs",)
assert get_model("vgg13/imagenet").layers != ("outputs",)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_plugins_file_and_module_register_their_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text(SOURCE.format(name="plugin/one"))
    (tmp_path / "milan_test_plugin_two.py").write_text(SOURCE.format(name="plugin/two"))
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins([str(tmp_path / "one.py"), "milan_test_plugin_two"])
    assert get_model("plugin/one").name == "plugin/one"
    assert get_model("plugin/two").name == "plugin/two"


def test_plugins_loaded_twice_run_once(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('run ')")
    for _ in range(2):
        load_plugins([str(tmp_path / "once.py")])
    assert (tmp_path / "log").read_text() == "run "


@pytest.mark.parametrize(
    ("source", "reason"), [(None, "FileNotFoundError"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")]
)
def test_plugins_broken_file_is_named_with_the_reason(tmp_path: Path, source: str | None, reason: str) -> None:
    if source is not None:
        (tmp_path / "broken.py").write_text(source)
    modules = set(sys.modules)
    with pytest.raises(MilanError, match=rf"broken\.py' cannot be imported \({reason}"):
        load_plugins([str(tmp_path / "broken.py")])
    assert not {name for name in set(sys.modules) - modules if "broken" in name}


def test_plugins_missing_module_is_named() -> None:
    with pytest.raises(MilanError, match="plug-in 'no_such_module_here' cannot be imported"):
        load_plugins(["no_such_module_here"])


NEIGHBOUR = """
from torch import nn
class Net(nn.Linear):
    width = {width}
    def __init__(self) -> None:
        super().__init__({width}, 2)
"""
WITH_NEIGHBOUR = """
from {module} import Net
from milan_ray.models.registry import register_model
def build(weights):
    from {module}_late import extra
    assert extra
    return Net()
register_model("{name}", build, ["outputs"])
"""


def test_a_plugin_imports_its_neighbours_at_once_and_later(tmp_path: Path) -> None:
    (tmp_path / "c6_net.py").write_text(NEIGHBOUR.format(width=3))
    (tmp_path / "c6_net_late.py").write_text("extra = True")
    (tmp_path / "mine.py").write_text(WITH_NEIGHBOUR.format(module="c6_net", name="c6/net"))
    load_plugins([str(tmp_path / "mine.py")])
    assert get_model("c6/net").load().in_features == 3


def test_two_plugins_with_neighbours_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for width, folder in ((3, "a"), (4, "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c6_twin.py").write_text(NEIGHBOUR.format(width=width))
        (tmp_path / folder / "c6_by.py").write_text("from c6_twin import Net")
        source = WITH_NEIGHBOUR.format(module="c6_by", name=f"c6/{folder}")
        (tmp_path / folder / f"{folder}_mine.py").write_text(source)
    load_plugins([str(tmp_path / "a/a_mine.py")])
    with pytest.raises(MilanError, match=r"b_mine\.py' .*imports c6_by, .*another module c6_by .*rename"):
        load_plugins([str(tmp_path / "b/b_mine.py")])
    (tmp_path / "b/json.py").write_text("loads = None")
    (tmp_path / "b/late.py").write_text("from json import loads")
    with pytest.raises(MilanError, match="another module json"):
        load_plugins([str(tmp_path / "b/late.py")])


NEIGHBOURS = {  # what a plug-in does to get a neighbour, and the neighbour
    "package without __init__": ("from c10nets.model import WHO", "c10nets/model.py"),
    "late": ("def build():\n    from c10late import WHO", "c10late.py"),
    "late package": ("def build():\n    import c10pack.sub", "c10pack/sub.py"),
    "by name": ("import importlib\nhelper = importlib.import_module('c10name')", "c10name.py"),
}


@pytest.mark.parametrize("how", NEIGHBOURS)
def test_neighbours_of_one_name_are_told_apart_however_imported(how: str, tmp_path: Path) -> None:
    source, neighbour = NEIGHBOURS[how]
    for folder in ("one", "two"):
        (tmp_path / folder / neighbour).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / neighbour).write_text(f"WHO = {folder!r}")
        (tmp_path / folder / "plug.py").write_text(source)
    load_plugins([str(tmp_path / "one/plug.py")])
    with pytest.raises(MilanError, match="rename the one beside it"):
        load_plugins([str(tmp_path / "two/plug.py")])


def test_files_beside_a_plugin_take_nobody_s_place(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text("x = 1")
    (tmp_path / "this.py").write_text("raise SystemExit")  # the standard library has one
    (tmp_path / "other.py").write_text("import this")
    load_plugins([str(tmp_path / "plug.py")])
    script = f"import milan_ray.plugins as p; p.load_plugins([{str(tmp_path / 'plug.py')!r}]); import this"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(MilanError, match="rename the one beside it"):
        load_plugins([str(tmp_path / "other.py")])


@pytest.mark.parametrize(("source", "match"), [("raise SystemExit(3)", "SystemExit"), ("from .h import X", "the dot")])
def test_plugins_that_end_the_program_or_import_with_a_dot_are_one_sentence(source, match, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(source)
    with pytest.raises(MilanError, match=match):
        load_plugins([str(tmp_path / "ends.py")])
