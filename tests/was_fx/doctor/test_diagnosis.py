"""`diagnose`, and what it says of a machine where something is wrong."""

from dataclasses import replace
from importlib import metadata

import pytest
import torch

from was_fx.doctor import diagnosis, hardware, installation, self_test
from was_fx.doctor.diagnosis import diagnose, problems
from was_fx.kernels.cpu import library
from was_fx.kernels.linear import cpu_gather

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    return diagnose(CPU)


def test_this_machine_is_well(found):
    assert problems(found) == []
    assert {"torch", "transformers", "lm-eval", "was-fx"} <= {each.name for each in found.packages}
    assert all(each.registered is not False for each in found.plug_ins)
    assert found.processor.kernels == library.KINDS[library.kind()]
    assert all(row.passed and row.ms > 0 for row in found.self_test)
    assert {row.implementation for row in found.self_test} >= {"cpu_gather", "cpu_quantized", "dense_product"}


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.9.1"}, "torch 2.9.1 is outside of >=2.11,<2.14"),
        ({"transformers": None}, 'transformers is not installed; run pip install "transformers'),
        ({"lm-eval": "0.3"}, "lm-eval 0.3 is outside of"),
        ({"lm-eval": None}, None),
        ({"torch": "2.13.0+cu130"}, None),
    ],
)
def test_versions_outside_of_the_range_are_problems(monkeypatch, versions, message):
    real = metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(installation.metadata, "version", version)
    said = [each.problem for each in installation.packages() if each.problem]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


def test_without_a_compiler_it_says_what_to_install(monkeypatch, found):
    monkeypatch.setattr(library, "FOLDER", library.FOLDER.parent / "parts")
    monkeypatch.setattr(library, "source_hash", lambda: "others")
    monkeypatch.setattr(library, "_compiler", lambda: None)
    broken = replace(found, processor=hardware.processor())
    assert broken.processor.kernels == ""
    (problem,) = problems(broken)
    assert "install g++" in problem
    assert problems(replace(broken, device="cuda:0")) == []


def test_an_unknown_kind_of_kernels_is_a_problem(monkeypatch):
    monkeypatch.setenv(library.LIMIT, "sse9")
    library.kind.cache_clear()
    try:
        assert "unset WAS_FX_CPU_KERNELS" in hardware.processor().problem
    finally:
        library.kind.cache_clear()


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch, found):
    right = cpu_gather.sparse_linear
    wrong = cpu_gather.choice()._replace(function=lambda *arguments: right(*arguments) * 1.5)
    monkeypatch.setattr(cpu_gather, "choice", lambda: wrong)
    (problem,) = problems(replace(found, self_test=tuple(self_test.self_test(CPU))))
    assert problem.startswith("cpu_gather is off by")
    assert "6 products" in problem


def test_a_kernel_that_raises_is_noticed(monkeypatch, found):
    def fail(*_):
        raise RuntimeError("no such instruction")

    broken = cpu_gather.choice()._replace(function=fail)
    monkeypatch.setattr(cpu_gather, "choice", lambda: broken)
    rows = self_test.self_test(CPU)
    assert [row.error for row in rows if row.implementation == "cpu_gather"] == [None] * 6
    (problem,) = problems(replace(found, self_test=tuple(rows)))
    assert "cpu_gather fails: no such instruction" in problem


def test_a_missing_registration_is_a_problem(monkeypatch, found):
    monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude_tags: ["inductor"])
    (problem,) = problems(replace(found, plug_ins=tuple(diagnosis.plug_ins())))
    assert "is not registered; run pip install ." in problem


def test_caches_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "was_fx" / "tuned"
    folder.mkdir(parents=True)
    (folder / "gpu.json").write_text("{}\n")
    tuned = {each.name: each for each in installation.caches()}["tile sizes tuned here"]
    assert (tuned.path, tuned.nbytes, tuned.files) == (str(folder), 3, 1)
