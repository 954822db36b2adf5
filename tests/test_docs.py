"""README.md and docs/: options, figures, paths and commands are those of the code."""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from zegformer_jax.cli import config
from zegformer_jax.cli.main import COMMANDS, Parser
from zegformer_jax.models.backbones import BACKBONES, backbone_fields
from zegformer_jax.text.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in PAGES}
# Folders that a path in the pages is relative to, and what begins a path outside the repository.
PLACES = ("zegformer_jax", "zegformer_jax/segmentation", "configs", "data")
ELSEWHERE = ("runs/", "mine/", "evaluation/step_", "evaluation/zegformer", "DIR/")
INDENTED = re.compile(r"^    (?:[A-Z_]+=\S+ )*\./run\.sh.*$", re.M)
INLINE = re.compile(r"`(\./run\.sh [^`]*)`")
ON_WORKERS = re.compile(r"^    on_workers '(?:nohup )?(\./run\.sh [^>\n]*?)(?: >.*)?'$", re.M)
PLACEHOLDERS = re.compile(r"\.\.\.|\bNAME\b|\bSOURCE\b")


@pytest.fixture(scope="module")
def options():
    """The script docs/options.py as a module."""
    spec = importlib.util.spec_from_file_location("options", ROOT / "docs" / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_up_to_date(options):
    page = options.make_page((ROOT / "configs" / "base.py").read_text("utf-8"))
    assert TEXTS["docs/options.md"] == page, "run python docs/options.py"


def leaves(section, prefix=""):
    """Fields by dotted name; an empty section is a field."""
    found = {}
    for name, value in section.items():
        is_section = isinstance(value, ConfigDict) and len(value) > 0
        found |= leaves(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return found


def test_the_page_of_options_has_every_field_with_its_default():
    rows = re.findall(r"^\| `(\S+)` \| `(.+?)` \| (\S.*) \|$", TEXTS["docs/options.md"], re.M)
    found = sorted((name, repr(eval(default))) for name, default, _ in rows)
    expected = list(leaves(base.get_config()).items())
    for backbone in set(BACKBONES) - {base.get_config().model.backbone.name}:
        expected += [(f"model.backbone.{k}", v) for k, v in backbone_fields(backbone).items()]
    plain = [(name, {} if isinstance(v, ConfigDict) else v) for name, v in expected]
    assert found == sorted((name, repr(value)) for name, value in plain)


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_published_figures_are_quoted_right(page):
    published = json.loads((ROOT / "data" / "published.json").read_text("utf-8"))
    rows = [row for row in published["rows"] if row["evaluated_on"] == row["trained_on"]]
    rows = [row for row in rows if row["source"] == "ZegFormer (CVPR 2022)"]
    assert [row["trained_on"] for row in rows] == ["coco_stuff", "pascal_voc"]
    for row in rows:
        (line,) = re.findall(rf"^\| .*\b{row['trained_on']}\.py:r101` \|.*$", TEXTS[page], re.M)
        figures = [row[name] for name in ("seen_iou", "unseen_iou", "harmonic_iou")]
        assert [float(x) for x in re.findall(r"\d+\.\d", line)] == figures


def test_photographs_with_the_authors_weights_take_three_commands():
    """The first section after the built-in benchmark; each command takes what the last one made."""
    section = TEXTS["README.md"].split("\n## ")[2]
    download, convert, predict = re.findall(r"^    ((?:curl|\./run\.sh) .*)$", section, re.M)
    assert "1bA6DXr9VOMsRkU0vyY2EpGRkyQnhnze3" in download and "non-commercial" in section
    assert "1qcIe2mE1VRU1apihsao4XvANJgU5lYgm" in section
    file, workdir = shlex.split(convert)[2:4]
    assert f" -o {file} " in download and f"--workdir={workdir}" in predict


def test_the_page_of_weights_has_every_start():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+://\S+)` \|", TEXTS["docs/weights.md"], re.M)
    assert dict(rows) == {
        k: v for backbone in BACKBONES.values() for k, v in backbone.starts.items()
    }


def test_the_list_of_classes_of_own_data_is_one():
    (text,) = re.findall(r"^```json\n(.*?)^```", TEXTS["docs/datasets.md"], re.M | re.S)
    classes = Vocabulary.parse(text, "docs/datasets.md")
    assert set(json.loads(text)) == {"classes", "ignore_label", "ignored_ids"}
    assert (classes.ids, classes.seen) == ((0, 1, 2), (True, True, False))


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page])
    links += re.findall(r"src=\"([^\"]+)", TEXTS[page])
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    paths = re.findall(r"^    \.venv/bin/python (\S+)", TEXTS[page], re.M)
    paths += re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|json|md))?|\w+\.py)`", TEXTS[page])
    places = (ROOT, *(ROOT / name for name in PLACES))
    missing = [path for path in paths if not any((place / path).exists() for place in places)]
    assert [path for path in missing if not path.startswith(ELSEWHERE)] == []


def commands():
    """Command lines of all pages."""
    text = "\n".join(TEXTS.values())
    lines = [x for pattern in (INDENTED, INLINE, ON_WORKERS) for x in pattern.findall(text)]
    return sorted({line.partition("  #")[0].strip() for line in lines})


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    words = shlex.split(PLACEHOLDERS.sub("folder", line))
    name, *arguments = words[words.index("./run.sh") + 1 :] or ["demo"]
    if name == "test":
        return  # run.sh's own
    command = importlib.import_module(COMMANDS[name])
    if arguments == ["--help"]:
        return
    parser = Parser(name, command.__doc__)
    command.add_arguments(parser)
    parsed = config.parse(parser, arguments)
    if getattr(parsed, "config", None):  # else the workdir's
        config.read(parsed)


BLOCKS = [
    x for text in TEXTS.values() for x in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_on_the_pages_is_python(block):
    compile(block, "page", "exec")


def test_an_addition_is_registered_where_the_page_says():
    text = TEXTS["docs/contributing.md"].replace("\n", " ")
    registries = dict(re.findall(r"line in `([A-Z]+)` of +`([\w/]+\.py)`", text))
    assert len(registries) == 6
    for name, path in registries.items():
        assert re.search(
            rf"^{name}\b.* = ", (ROOT / "zegformer_jax" / path).read_text("utf-8"), re.M
        )
    tests = set(re.findall(r"`(tests/\w+/test_adding_\w+\.py)`", text))
    assert tests == {str(x.relative_to(ROOT)) for x in (ROOT / "tests").rglob("test_adding_*.py")}
