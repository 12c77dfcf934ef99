"""What the machine and its environment say is obeyed, or named in one line."""

import os
import py_compile
import sys

from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.tasks import load_task


def test_no_cache_is_read_or_left_in_a_recipes_folder(tiny, tmp_path, monkeypatch):
    """Nor of what task.py imports from there, at once or later, be it a module or a package."""
    folder = tmp_path / "mine"
    (folder / "helpers" / "deep").mkdir(parents=True)
    (folder / "recipe.yaml").write_text((tiny / "recipe.yaml").read_text())
    for name in ("helpers/__init__.py", "helpers/deep/__init__.py"):
        (folder / name).write_text("")
    (folder / "helpers/deep/words.py").write_text("GOOD = ['great']\n")
    (folder / "later.py").write_text("WORD = 'fine'\n")
    (folder / "task.py").write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
        "from helpers.deep.words import GOOD\n\ndef word():\n    import later\n    return later.WORD\n"
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    task = load_task(load_recipe(folder))
    assert (task.GOOD, task.word()) == (["great"], "fine")
    assert not list(folder.rglob("__pycache__"))
    for name in ("helpers", "helpers.deep", "helpers.deep.words", "later"):
        del sys.modules[name]

    file = folder / "later.py"
    py_compile.compile(str(file), doraise=True)  # somebody else's cache, of an older text with the same time and size
    time = file.stat().st_mtime_ns
    file.write_text("WORD = 'dull'\n")
    os.utime(file, ns=(time, time))
    assert task.word() == "dull"
    del sys.modules["later"]
