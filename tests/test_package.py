"""The distribution as a whole: version, public names, layers, what imports what, shipped files, hardware files."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import trainworks
from trainworks.shipped import configs_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("trainworks", "pretrain", "finetune", "model_cards")
HARDWARE_FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def package_modules() -> list[str]:
    """Name every module of the packages but the commands' own `__main__`."""
    found = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        walked = pkgutil.walk_packages(module.__path__, f"{package}.")
        found += [package, *(info.name for info in walked if not info.name.endswith("__main__"))]
    return found


def public_names(module: ModuleType) -> list[str]:
    """Return a module's `__all__`; a package that only holds modules needs none."""
    return list(vars(module).get("__all__", []))


def own_names(module: ModuleType) -> set[str]:
    """Name the functions and classes without an underscore that a module defines itself."""
    return {
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and value.__name__ == name  # an alias belongs to what it names
        and name.isidentifier()  # pydantic leaves `Generic[int]` in the module
        and not name.startswith("_")
    }


def text_files() -> list[Path]:
    """List the project's text files, those that git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    kinds = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".ipynb", ".html", ".jinja"}
    files = [ROOT / name for name in names if name]
    return [file for file in files if file.is_file() and file.suffix in kinds]


def test_the_version_stands_once() -> None:
    assert trainworks.__version__ == PROJECT["project"]["version"]


def test_every_public_name_is_listed_and_every_listed_name_exists() -> None:
    modules = [importlib.import_module(name) for name in package_modules()]
    assert len(modules) >= 20
    wrong = []
    for module in modules:
        listed = public_names(module)
        missing = [name for name in listed if not hasattr(module, name)]
        unlisted = sorted(name for name in own_names(module) if name not in listed)
        if missing or unlisted or len(listed) != len(set(listed)):
            wrong.append(f"{module.__name__}: {missing=} {unlisted=} {listed=}")
    assert not wrong, "\n".join(wrong)


def test_no_public_function_of_a_package_hides_one_of_its_modules() -> None:
    packages = [module for module in map(importlib.import_module, package_modules()) if hasattr(module, "__path__")]
    assert len(packages) >= 8
    for package in packages:
        modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
        functions = {name for name in public_names(package) if inspect.isfunction(getattr(package, name))}
        assert not functions & modules, f"{package.__name__}: {sorted(functions & modules)} would hide a module"


def test_the_layer_rule_names_every_module() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = set(re.findall(r"[\w.]+", " ".join(layers)))
    members = {f"trainworks.{info.name}" for info in pkgutil.iter_modules(trainworks.__path__)}
    assert len(members) >= 10
    assert members <= named, f"the layers in pyproject.toml do not place {sorted(members - named)}"


LIGHT = ["trainworks", "trainworks.cli", "trainworks.tasks", "trainworks.record", "trainworks.schema", "model_cards"]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_no_heavy_library(module: str) -> None:
    heavy = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate")
    probe = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ast.literal_eval(answer.stdout) == []


def test_no_file_holds_a_path_of_one_machine() -> None:
    files = text_files()
    assert len(files) >= 30
    machine_path = re.compile(r"(?<![\w.:/-])/(?:(?:home|Users)/(?!me\b)|root/|work/)\w")  # an example's user is `me`
    held = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not held, "\n".join(held)


def test_the_constraints_pin_exact_public_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


@pytest.mark.parametrize("file", HARDWARE_FILES, ids=lambda file: file.stem)
def test_accelerate_reads_a_hardware_file(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    assert config.num_processes >= 1


@pytest.mark.parametrize("file", HARDWARE_FILES, ids=lambda file: file.stem)
def test_every_fsdp_key_is_an_option_of_the_launcher(file: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    fsdp = yaml.safe_load(file.read_text()).get("fsdp_config", {})
    assert set(fsdp) <= options
    settings = yaml.safe_load(file.read_text())
    assert bool(fsdp) == (settings["distributed_type"] == "FSDP")
    sizes = settings.get("parallelism_config", {})
    assert set(sizes) <= options
    # accelerate takes these under FSDP alone, and their product for all its processes.
    assert bool(fsdp) or not sizes
    assert settings["num_processes"] % math.prod(sizes.values()) == 0


def test_every_hardware_file_opens_with_the_command_that_uses_it() -> None:
    assert len(HARDWARE_FILES) >= 4
    for file in HARDWARE_FILES:
        comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert f"accelerate launch --config_file configs/accelerate/{file.name}" in comment


def test_the_configurations_are_found_in_a_checkout() -> None:
    assert configs_folder() == ROOT / "configs"


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_finds_its_configurations(tmp_path: Path) -> None:
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run([sys.executable, *build], check=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("trainworks-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    shipped = {name for name in names if name.startswith("trainworks/configs/")}
    assert {f"trainworks/configs/accelerate/{file.name}" for file in HARDWARE_FILES} <= shipped
    assert shipped == {f"trainworks/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.*")}

    probe = "from trainworks.shipped import configs_folder; print(configs_folder())"
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    answer = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert Path(answer.stdout.strip()) == tmp_path / "site" / "trainworks" / "configs"
