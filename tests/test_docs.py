"""What the documentation names exists: settings, commands and their options, files; and the rules that the site is built by."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from modip_ray import cli
from modip_ray.config import config_dir, load, parse_scalar
from modip_ray.study.spec import load_study
from scripts import results_table
from scripts.docs import commands, settings
from scripts.docs.griffe_lists import with_lists

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "tests" / "README.md"])
MADE = {ROOT / "docs" / name for name in ("results.md", "reference/settings.md", "reference/commands.md")}      # by scripts/docs/hooks.py
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)")
GROUPS = {name: value for name, value in load().to_dict().items() if isinstance(value, dict)}


def pages() -> list:
    return [pytest.param(page.read_text(), page, id=page.relative_to(ROOT).as_posix()) for page in PAGES]


def typed_commands(text: str) -> list[list[str]]:
    """Arguments of each `modip ...` or `python -m modip_ray ...` that a page gives in a block or in backticks."""
    lines = "\n".join(body for _, body in FENCE.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in [*lines, *spans]:
        match = re.match(r"\s*(?:\w+=\S+ )*(?:modip|python -m modip_ray) (.*)", line)
        if match:
            found.append(shlex.split(re.sub(r" +#.*| +&$", "", match[1])))
    return found


def settings_in(words: list[str]) -> list[str]:
    """Dotted names of settings that a command sets."""
    return [w.partition("=")[0] for w in words if re.match(r"[a-z_]+\.[a-z_]+=", w)]


@pytest.mark.parametrize("text, page", pages())
def test_links_lead_to_files(text, page):
    for target in LINK.findall(re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))):
        if "://" not in target:
            there = (page.parent / target).resolve()
            assert there.exists() or there in MADE, f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("text, page", pages())
def test_commands_can_be_typed(text, page, capsys):
    known = {name.removeprefix("modip ") for name, _ in commands.leaves(cli.parser())} | {"data", "jobs"}
    for words in typed_commands(text):
        if not words or words[0].startswith("{") or words[0] == "COMMAND":
            continue
        assert words[0] in {k.split()[0] for k in known}, f"{page.name}: modip {words[0]} is no command"
        if len(words) == 1 or "..." in words or words[-1] == "--to":
            continue                                                                # only named
        if words[0] == "bench":
            continue                                                                # its arguments are bench/run.py's
        if "--help" not in words and not any(re.match(r"[\[{]", w) for w in words[1:]):
            try:
                rest = cli.parser().parse_known_args(words)[1]
                assert all("=" in word and not word.startswith("-") for word in rest), f"{page.name}: modip {' '.join(words)}: {rest}"
            except SystemExit:
                pytest.fail(f"{page.name}: modip {' '.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
        if words[0] in ("train", "submit", "eval"):
            for key in settings_in(words):
                group, name = key.split(".")
                assert name in GROUPS.get(group, {}), f"{page.name}: {key} is no setting"


@pytest.mark.parametrize("text, page", pages())
def test_settings_in_backticks_exist(text, page):
    """`group.name` in plain text, where group is one of the settings' groups; names of benchmarks look alike."""
    benches = "\n".join(path.read_text() for path in [*(ROOT / "results" / "bench").glob("*.json"), *(ROOT / "modip_ray").glob("bench*.py")])
    for group, name in re.findall(r"`([a-z_]+)\.([a-z_]+)(?:=[^`]*|: [^`]*)?`", FENCE.sub("", text)):
        if group in GROUPS and f"{group}.{name}" not in benches and name not in ("py", "act", "pt", "onnx", "safetensors", "yaml"):
            assert name in GROUPS[group] or any(field.startswith(name) and name.endswith("_") for field in GROUPS[group]), f"{group}.{name}"


@pytest.mark.parametrize("text, page", pages())
def test_named_files_exist(text, page):
    """Paths of the repository in backticks and in commands; `model/unet.py` is short for modip_ray/model/unet.py."""
    body = "\n".join(body for _, body in FENCE.findall(text))
    named = re.findall(r"`(?:python )?([\w./-]+/[\w.-]+\.(?:py|md|sh|yaml))\b[^`]*`", FENCE.sub("", text)) + re.findall(r"python ([\w./-]+\.py)", body)
    for name in named:
        if not name.startswith("runs/") and not name.isupper() and "TASK" not in name and "NAME" not in name and "..." not in name:
            assert any((folder / name).is_file() for folder in (ROOT, page.parent, ROOT / "modip_ray", ROOT / "docs")), f"{page.name}: {name}"


@pytest.mark.parametrize("left", ["nothing", "without pip"])
def test_make_sets_up_an_environment_also_where_a_half_made_one_is_left(tmp_path, left):
    """As `python3.11 -m venv` leaves it where Debian's python3.11-venv is missing: with an interpreter, without pip."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def script(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if left == "without pip":
        script(".venv/bin/python", "echo 'No module named pip' >&2; exit 1")
    script("good", 'echo "$@" >> installed')
    script("python", '[ "$*" = "-m venv --clear .venv" ] && mkdir -p .venv/bin && cp good .venv/bin/python')
    for _ in range(2):
        done = subprocess.run(["make", "install", "PYTHON=./python"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "requirements.txt" in (tmp_path / "installed").read_text()
    assert all("python3.11-venv" in (ROOT / name).read_text() for name in ("README.md", "docs/faq.md"))


def test_every_setting_has_a_comment(tmp_path):
    found = settings.read_settings()
    assert {s.name for s in found} >= {"planner.horizon", "seed", "resources.placement"} and all(s.comment for s in found)
    broken = tmp_path / "default.yaml"
    broken.write_text("group:\n  # Said.\n  a: 1\n  b: 2\n")
    with pytest.raises(settings.SettingsError, match="default.yaml:4: group.b has no comment above it"):
        settings.read_settings(broken)


def test_the_settings_page_shows_type_default_and_comment():
    page = settings.page()
    assert "`policy.network` = `mlp`\n:   <small>mlp | unet</small>" in page and "`resources.compile` = `auto`\n:   <small>true | false | auto</small>" in page
    assert "Seed of everything random" in page and "configs/tasks/&lt;name&gt;.yaml" in page


def test_aligned_arguments_become_a_list():
    assert with_lists("A policy.\n\nmode : how\nseed : of noise,\n       all of it\nRaises it.") == \
        "A policy.\n\n\n- `mode`: how\n- `seed`: of noise,\n       all of it\n\nRaises it."


def test_the_site_loads_nothing_from_elsewhere_and_has_all_pages():
    class Loader(yaml.SafeLoader):
        pass
    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert site["theme"]["font"] is False and not any("://" in str(site.get(key)) for key in ("extra_css", "extra_javascript", "theme", "plugins", "hooks"))
    assert "url(" not in (ROOT / "docs" / "style.css").read_text()
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    missing = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")} - listed
    assert not missing, f"{missing}: give them a place in nav of mkdocs.yml"


def test_the_readmes_tables_are_of_the_kept_results():
    shown = (ROOT / "README.md").read_text().split(results_table.BEGIN)[1].split(results_table.END)[0]
    assert shown.strip() == results_table.block().strip(), "python scripts/results_table.py writes them anew"


def test_every_command_of_the_papers_tables_can_be_run():
    """Each `modip study` of configs/paper.sh, with its settings, makes valid runs."""
    script = (config_dir() / "paper.sh").read_text().replace("\\\n", " ")
    typed = [shlex.split(line) for line in re.findall(r"modip study (.*?) \"\$@\"", script)]
    assert len(typed) == 3
    for study, *overrides in typed:
        cells = load_study(study, [*overrides, "seeds=[0]"]).cells()
        assert len(cells) >= 4 and all(c.cfg.online.env_steps in (0, 10**6) for c in cells)
    assert all(parse_scalar(o.partition("=")[2]) is not None for _, *overrides in typed for o in overrides)
