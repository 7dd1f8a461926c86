"""The distributions as users get them: built wheels, installed one by one where nothing else is."""

from __future__ import annotations

import re
import zipfile
from email.parser import Parser

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

MODULES = {
    "nnterp-core": ("nnterp",),
    "nnterp-interventions": ("nnterp.interventions",),
    "nnterp-prompts": ("nnterp.prompts", "nnterp.prompt_utils"),
    "nnterp-display": ("nnterp.display",),
}
SIBLINGS = {module: name for name, modules in MODULES.items() if name != "nnterp-core" for module in modules}

CHECK_IMPORTS = """
import importlib, sys
import nnterp

for module in {present}:
    found = importlib.import_module(module)
    assert found.__file__.startswith(sys.prefix), found.__file__
    assert found.__all__  # imports what it offers
for module, distribution in {absent}.items():
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        assert error.name == module, error.name
        assert str(error).endswith("pip install " + distribution), error
    else:
        raise AssertionError(module + " can be imported, though " + distribution + " is not installed")
heavy = {{"plotly", "pandas"}} & set(sys.modules)
assert "nnterp.display" in {present} or not heavy, heavy
"""

TRACE_THE_TOY = """
import importlib.util, sys
import torch
import nnterp

assert nnterp.__file__.startswith(sys.prefix), nnterp.__file__
model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
with model.trace("The capital of France is"):
    hidden = model.layers_output[-1].save()
    logits = model.logits.save()
assert hidden.shape[-1] == model.hidden_size
assert logits.shape[-1] == model.vocab_size
assert torch.equal(logits.argmax(-1), model.project_on_vocab(hidden).argmax(-1))
print("next:", model.tokenizer.decode(logits[0, -1].argmax()))
assert model.certificate.ok
for module in ("plotly", "pandas"):
    assert importlib.util.find_spec(module) is None, module + " came with nnterp-core"
    assert module not in sys.modules
"""


def files(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_five_distributions_are_built(wheels):
    assert set(wheels) == {"nnterp", *MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_a_wheel_holds_its_modules_and_nothing_else(wheels, name):
    held = files(wheels[name])
    code = [path for path in held if ".dist-info/" not in path]
    folders = tuple(module.replace(".", "/") + "/" for module in MODULES[name])
    assert [path for path in code if not path.startswith(folders)] == []
    for folder in folders:
        assert folder + "__init__.py" in code
        assert folder + "py.typed" in code
    assert any(re.search(r"\.dist-info/licenses/LICENSE$", path) for path in held)
    unwanted = r"(^|/)(tests?|__pycache__|docs|tools|benchmarks)/|\.pyc$|uv\.lock"
    assert [path for path in held if re.search(unwanted, path)] == []
    if name == "nnterp-core":
        siblings = tuple(module.replace(".", "/") + "/" for module in SIBLINGS)
        assert [path for path in code if path.startswith(siblings)] == []


def test_no_file_is_in_two_wheels(wheels):
    held = [path for wheel in wheels.values() for path in files(wheel)]
    assert sorted(held) == sorted(set(held))


def test_the_umbrella_has_no_code(wheels):
    assert [path for path in files(wheels["nnterp"]) if ".dist-info/" not in path] == []
    required = [r for r in metadata(wheels["nnterp"]).get_all("Requires-Dist") if ";" not in r]
    assert {re.split(r"[<>=]", r)[0] for r in required} == {"nnterp-core", "nnterp-interventions", "nnterp-prompts"}


@pytest.mark.parametrize("name", ["nnterp", *MODULES])
def test_metadata(wheels, name):
    said = metadata(wheels[name])
    assert said["License-Expression"] == "MIT"
    assert said["Summary"]
    assert said.get_payload().strip(), "the README is the package's page"
    for requirement in said.get_all("Requires-Dist") or []:
        required, versions = re.match(r"([\w.-]+)(?:\[\w+\])?([^;]*)", requirement).groups()
        if required.startswith("nnterp"):
            assert re.fullmatch(r"\s*<3,>=2\.\d+|\s*>=2\.\d+,<3", versions.strip()), f"{requirement}: not a range"


def test_the_toy_checkpoint_is_in_the_core_wheel(wheels):
    with zipfile.ZipFile(wheels["nnterp-core"]) as archive:
        toy = [entry for entry in archive.infolist() if entry.filename.startswith("nnterp/_toy/")]
    names = {entry.filename.removeprefix("nnterp/_toy/") for entry in toy}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(entry.file_size for entry in toy) <= 4 * 2**20


def add(environment, wheels, present, name):
    """Install one more package beside those whose modules are `present`; what is there is imported, the rest is not."""
    environment.install(wheels[name])
    present += MODULES[name]
    absent = {module: distribution for module, distribution in SIBLINGS.items() if module not in present}
    environment.python(CHECK_IMPORTS.format(present=present, absent=absent))


def test_core_alone_then_its_siblings_one_at_a_time(wheels, environment):
    """The umbrella is installed before display comes, and adds itself alone."""
    present = []
    add(environment, wheels, present, "nnterp-core")
    assert "next:  Paris" in environment.python(TRACE_THE_TOY)
    for name in ("nnterp-interventions", "nnterp-prompts"):
        add(environment, wheels, present, name)
    before = environment.installed()
    environment.install(wheels["nnterp"])
    assert environment.installed() - before == {f"nnterp=={metadata(wheels['nnterp'])['Version']}"}
    assert before < environment.installed()
    assert "Paris" in environment.nnterp("demo")
    add(environment, wheels, present, "nnterp-display")
    assert set(SIBLINGS) < set(present)


def test_siblings_are_added_in_another_order(wheels, environment):
    present = []
    for name in ("nnterp-core", "nnterp-display", "nnterp-prompts", "nnterp-interventions"):
        add(environment, wheels, present, name)
    assert set(SIBLINGS) < set(present)
