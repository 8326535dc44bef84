"""How the C++ kernels are found, compiled, kept and chosen."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from was_fx.kernels.cpu import library as module
from was_fx.kernels.linear import cpu_embedding_bag, dense_linear
from was_fx.kernels.linear.sparse_linear import choose

if module.library() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    """No library is known, packaged or kept; compiling takes no time, as the sources are a stub's."""
    stub = tmp_path / "sources"
    stub.mkdir()
    (stub / "kernels.cpp").write_text(
        'extern "C" const char* was_source() { return WAS_SOURCE; }\n'
        'extern "C" long was_processor() { return 2; }\n'
        'extern "C" void was_gather() {}\nextern "C" void was_gather_one() {}\n'
        'extern "C" void was_product() {}\nextern "C" void was_rows() {}\nextern "C" void was_write_out() {}\n'
        'extern "C" long was_run() { return -1; }\nextern "C" long was_parts() { return 0; }\n'
    )
    for name in module.SOURCES[1:]:
        (stub / name).write_text("")
    monkeypatch.setattr(module, "FOLDER", stub)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = (module.library, module.kind, module._temporary_folder)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "was_fx").iterdir())


def test_the_sources_are_compiled_once_and_kept_for_the_user_alone(tmp_path):
    assert module.library().was_processor() == 2
    (file,) = kept(tmp_path)
    assert not file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    written = file.stat().st_mtime_ns
    module.library.cache_clear()
    assert module.library() is not None
    assert [file.stat().st_mtime_ns for file in kept(tmp_path)] == [written]


def test_other_sources_are_compiled_anew(tmp_path):
    module.library()
    (module.FOLDER / "body.inc").write_text("// changed")
    module.library.cache_clear()
    assert module.library() is not None
    assert len(kept(tmp_path)) == 2


def test_a_packaged_library_is_taken_if_it_is_of_these_sources(tmp_path, monkeypatch):
    module.library()
    (file,) = kept(tmp_path)
    packaged = module.FOLDER / "cpu_kernels.so"
    packaged.write_bytes(file.read_bytes())
    monkeypatch.setattr(module, "compiled", lambda source: pytest.fail("compiled"))
    module.library.cache_clear()
    assert module.library() is not None
    (module.FOLDER / "body.inc").write_text("// changed")
    monkeypatch.setattr(module, "compiled", lambda source: None)
    module.library.cache_clear()
    assert module.library() is None


@pytest.mark.parametrize("mode", [0o666, 0o646], ids=oct)
def test_a_kept_file_that_others_may_write_is_not_run(tmp_path, mode):
    module.library()
    (file,) = kept(tmp_path)
    file.unlink()  # this process has it loaded
    file.write_bytes(b"somebody else's")
    file.chmod(mode)
    module.library.cache_clear()
    assert module.library().was_processor() == 2
    (file,) = kept(tmp_path)
    assert file.read_bytes() != b"somebody else's"


def test_a_cache_folder_that_others_may_write_is_not_used(tmp_path):
    folder = tmp_path / "cache" / "was_fx"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert module.library() is not None
    assert kept(tmp_path) == []


def test_a_cache_that_is_a_file_is_no_obstacle(tmp_path):
    (tmp_path / "cache").write_text("")
    assert module.library() is not None


def test_a_home_that_is_missing_is_no_obstacle(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/nonexistent/home")
    assert module.library() is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_is_read_only_is_no_obstacle(tmp_path):
    folder = tmp_path / "cache" / "was_fx"
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    assert module.library() is not None
    assert kept(tmp_path) == []


def test_cxx_may_be_a_command_with_arguments(monkeypatch, tmp_path):
    log = tmp_path / "arguments"
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$1" > {log}\nshift\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} 'an argument'")
    assert module.library() is not None
    assert log.read_text() == "an argument\n"


def test_a_cxx_that_is_missing_leaves_the_usual_compilers(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert module.library() is not None


COMPILE = """
import sys
from pathlib import Path
from was_fx.kernels.cpu import library
library.FOLDER = Path(sys.argv[1])
print(library.library().was_processor())
"""


def test_two_processes_may_compile_at_once(tmp_path):
    command = [sys.executable, "-c", COMPILE, str(module.FOLDER)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == ["2", "2"]
    assert len(kept(tmp_path)) == 1


def test_a_compiler_that_is_killed_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module.library()
    assert kept(tmp_path) == []


def without_compiler(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


def test_without_a_compiler_torch_takes_over_and_what_it_costs_is_said_once(make_case, error, monkeypatch, caplog):
    without_compiler(monkeypatch)
    case = make_case((1, 12), (5, 7))
    for _ in range(2):
        assert choose(case.x, case.weights).function is cpu_embedding_bag.sparse_linear
    assert ["no C++ compiler found" in record.message for record in caplog.records] == [True]
    assert "twice as long: no C++ compiler found; install g++" in caplog.text


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prompts_without_a_compiler_are_right(make_case, error, monkeypatch, dtype, native):
    without_compiler(monkeypatch)
    monkeypatch.setattr(dense_linear, "multiplies_natively", lambda dtype: native or dtype == torch.float32)
    case = make_case((30, 600), (41,), dtype, threshold=0, biases=[True])
    upcast = not native and dtype != torch.float32
    assert dense_linear.choose(case.x, case.weights[0]).name == ("cpu_upcast" if upcast else "torch")
    y = dense_linear.dense_linear(case.x, case.weights[0], case.biases[0])
    assert y.dtype == dtype
    assert error(y, case.exact()) < 1e-2


def test_a_compiler_that_fails_is_reported_with_what_it_said(make_case, caplog):
    (module.FOLDER / "kernels.cpp").write_text("this is no C++")
    case = make_case((1, 12), (5, 7))
    assert choose(case.x, case.weights).function is cpu_embedding_bag.sparse_linear
    assert "can't be compiled" in caplog.text
    assert "error" in caplog.text


def test_the_kind_is_at_most_the_processors(monkeypatch):
    for name, expected in (("", 2), ("amx", 2), ("avx512", 2), ("avx2", 1), ("plain", 0)):
        monkeypatch.setenv(module.LIMIT, name)
        module.kind.cache_clear()
        assert module.kind() == expected


def test_an_unknown_kind_names_those_there_are(monkeypatch):
    monkeypatch.setenv(module.LIMIT, "sse")
    with pytest.raises(ValueError, match="WAS_FX_CPU_KERNELS is 'sse'; expected one of plain, avx2, avx512"):
        module.kind()
