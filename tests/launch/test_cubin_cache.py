"""The disk cache of compiled kernels: what is in a name, what a file survives, and that a device takes what it finds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import logging
import os
import struct
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cce_numba import disk
from cce_numba.interchange import BFLOAT16
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba import cuda
from numba.cuda import types

from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch import cubin_cache
from cce_numba.launch import kernel as launch
from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.cubin_cache import load, store
from cce_numba.launch.identity import identity
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.launch.offline import precompile
from cce_numba.ptx import cluster
from cce_numba.tensor_core.folds import MAX_SUM, SURVIVORS
from cce_numba.tensor_core.indexed_dot import make_indexed_dot_kernel
from cce_numba.tensor_core.merge import make_merge_kernel
from cce_numba.tensor_core.reduction import make_reduce_kernel
from cce_numba.tensor_core.tokens import make_list_tokens_kernel

PARAMETERS = (types.int32,)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Its methods are in no source of the package."""

    size: int = 3


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A cache directory that is not there yet. Sources stay what they are, even if somebody edits them meanwhile."""
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "sources")
    return tmp_path / "deep" / "cache"


def make(*, function=None, parameters=PARAMETERS, identity="its factory", **shape):
    kernel = Kernel(function or (lambda x: None), parameters, **{"threads": 32, **shape})
    kernel.identity = identity
    return kernel


def path_of(kernel, cc):
    return kernel.path(cc)


# What is in a name


def test_a_name_tells_all_that_machine_code_depends_on(monkeypatch):
    def some_kernel(x):
        pass

    paths = [
        path_of(make(), (9, 0)),
        path_of(make(), (10, 0)),
        path_of(make(identity="another"), (9, 0)),
        path_of(make(function=some_kernel), (9, 0)),
        path_of(make(parameters=(types.int64,)), (9, 0)),
        path_of(make(threads=64), (9, 0)),
        path_of(make(threads=(16, 2)), (9, 0)),
        path_of(make(ctas=2), (9, 0)),
        path_of(make(cluster=2), (9, 0)),
        path_of(make(smem_bytes=16), (9, 0)),
    ]
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "other sources")
    paths.append(path_of(make(), (9, 0)))
    monkeypatch.setattr(cubin_cache, "_compiler", lambda: ("another",))
    paths.append(path_of(make(), (9, 0)))
    assert len(set(paths)) == len(paths)
    assert path_of(make(), (9, 0)) == paths[-1]


@pytest.mark.parametrize(("module", "version"), [("numba_cuda", "0.30.99"), ("numba", "0.99.1"), ("cuda.bindings", "99.5.0")])
def test_another_compiler_has_another_name(monkeypatch, module, version):
    before = cubin_cache._compiler()
    monkeypatch.setattr(f"{module}.__version__", version)
    assert cubin_cache._compiler.__wrapped__() != before


@pytest.mark.parametrize("module", ["numba", "cuda.bindings"])
def test_a_release_that_only_corrects_has_the_same_name(monkeypatch, module):
    before, version = cubin_cache._compiler(), importlib.import_module(module).__version__
    monkeypatch.setattr(f"{module}.__version__", f"{version.rpartition('.')[0]}.99")
    assert cubin_cache._compiler.__wrapped__() == before


@pytest.mark.parametrize(("option", "value"), [("CUDA_DEBUGINFO_DEFAULT", 1), ("OPT", 0), ("FORCE_CUDA_CC", (8, 0))])
def test_another_setting_of_numba_has_another_name(monkeypatch, option, value):
    before = cubin_cache._compiler()
    monkeypatch.setattr(f"numba.cuda.core.config.{option}", value)
    assert cubin_cache._compiler.__wrapped__() != before


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Gives the digest of a small package's sources, as of a process that starts now."""
    root = tmp_path / "package"
    (root / "part").mkdir(parents=True)
    (root / "a.py").write_text("1")
    (root / "part" / "b.py").write_text("2")
    monkeypatch.undo()  # of the other fixture
    monkeypatch.setattr(cubin_cache, "_ROOT", root)

    def digest():
        monkeypatch.setattr(cubin_cache, "_IMPORTED", 1 + max(path.stat().st_ctime for path in root.rglob("*")))
        monkeypatch.setattr(cubin_cache, "_digest_of_sources", functools.cache(cubin_cache._digest_of_sources.__wrapped__))
        return cubin_cache._sources()

    digest.root = root
    return digest


def test_any_change_of_any_source_changes_the_name(sources):
    digests = [sources()]
    (sources.root / "part" / "b.py").write_text("3")
    digests.append(sources())
    (sources.root / "c.py").write_text("")
    digests.append(sources())
    (sources.root / "c.py").rename(sources.root / "d.py")
    digests.append(sources())
    (sources.root / "a.py").write_text("")
    (sources.root / "d.py").write_text("1")
    digests.append(sources())
    assert len(set(digests)) == len(digests)
    assert sources() == digests[-1]
    (sources.root / "notes.txt").write_text("not compiled")
    assert sources() == digests[-1]


def test_nothing_is_kept_once_a_source_is_newer_than_the_process(sources, monkeypatch):
    assert sources() is not None
    changed = sources.root / "part" / "b.py"
    os.utime(changed, (1, 1))  # what tells is not the time that a copy brings along
    monkeypatch.setattr(cubin_cache, "_IMPORTED", changed.stat().st_ctime - 1e-3)
    assert cubin_cache._sources() is None


def test_nothing_is_kept_where_sources_cannot_be_read(sources):
    (sources.root / ".#a.py").symlink_to("nowhere")  # as editors do
    assert cubin_cache._sources() is None


def test_nothing_is_kept_where_there_are_no_sources(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cubin_cache, "_ROOT", tmp_path)
    assert cubin_cache._sources() is None


# What factories are told


def test_kernels_of_different_arguments_are_told_apart():
    f16, f32 = np.dtype(np.float16), np.dtype(np.float32)
    kernels = [
        *(make_forward_kernel(HopperTiles(), dtype, bias, capped, scaled, (MAX_SUM, *more))
          for dtype, bias, capped, scaled, more in itertools.product(
              (f16, BFLOAT16), (None, f32), (False, True), (False, True), ((), (SURVIVORS,)))),
        make_forward_kernel(HopperTiles(cluster=1), f16, None, False, False, (MAX_SUM,)),
        *(make_indexed_dot_kernel(f16, None, aligned) for aligned in (False, True)),
        *(make_merge_kernel(HopperTiles(cluster=cluster).group_n, (MAX_SUM,)) for cluster in (1, 2)),
        make_list_tokens_kernel(),
        make_reduce_kernel(),
    ]  # fmt: skip
    paths = [path_of(kernel, (9, 0)) for kernel in kernels]
    assert None not in paths
    assert len(set(paths)) == len(kernels)


def test_a_factory_remembers_its_kernels_and_stays_what_it_was():
    f16 = np.dtype(np.float16)
    assert make_indexed_dot_kernel(f16, None, True) is make_indexed_dot_kernel(f16, None, True)
    assert make_indexed_dot_kernel(f16, None, True) is not make_indexed_dot_kernel(f16, None, False)
    assert make_indexed_dot_kernel.__name__ == "make_indexed_dot_kernel"
    assert make_indexed_dot_kernel.__doc__.startswith("The kernel for `dtype`")


def function_of_the_package():
    def factory(*values, more=0):
        pass

    factory.__module__, factory.__qualname__ = "cce_numba.somewhere", "factory"
    return factory


def test_it_does_not_matter_how_arguments_are_passed():
    f16 = np.dtype(np.float16)
    by_name = identity(make_indexed_dot_kernel, dtype=f16, aligned=True, bias_dtype=None)
    assert by_name == identity(make_indexed_dot_kernel, f16, None, True)
    assert "dtype=dtype('float16')" in by_name
    assert "aligned=True" in by_name
    assert identity(function_of_the_package()) == identity(function_of_the_package(), more=0)


def test_values_of_different_kinds_are_told_apart():
    values = [
        *(None, True, 1, 1.0, -0.0, 0.0, "1", "None", np.dtype("f4"), np.dtype(">f4"), BFLOAT16, (), (1,), ((1,),), ("1, ",)),
        *(HopperTiles(), HopperTiles(cluster=1), (HopperTiles(),)),
    ]
    told = [identity(function_of_the_package(), value) for value in values]
    assert None not in told
    assert len(set(told)) == len(values)
    assert identity(function_of_the_package(), 1, 2) != identity(function_of_the_package(), 1, more=2)


@pytest.mark.parametrize("value", [np.float32(1), np.float64(1), [1], {}, len, lambda: None, (1, [2]), Elsewhere(), object, 1j])
def test_what_may_not_be_told_apart_is_not_kept(value, caplog):
    with caplog.at_level(logging.DEBUG):
        assert identity(function_of_the_package(), value) is None
    assert "what a factory is told must be None, bool" in caplog.text


def test_kernels_of_other_factories_are_not_kept():
    @kernel_factory
    def make_it():
        return Kernel(lambda x: None, PARAMETERS, threads=32)

    @kernel_factory
    def make_another():
        return ArrayKernel(lambda x: None, block=32)

    assert make_it().identity is make_another().identity is None
    assert path_of(make_it(), (9, 0)) is None
    assert path_of(Kernel(lambda x: None, PARAMETERS, threads=32), (9, 0)) is None


# Where


def test_the_directory(monkeypatch, tmp_path):
    assert path_of(make(), (9, 0)).parent == Path(os.environ["CCE_CACHE_DIR"])
    monkeypatch.delenv("CCE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert path_of(make(), (9, 0)).parent == tmp_path / "xdg" / "cce_numba"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert path_of(make(), (9, 0)).parent == tmp_path / "home" / ".cache" / "cce_numba"


def test_an_empty_name_turns_the_cache_off(monkeypatch):
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    assert path_of(make(), (9, 0)) is None
    assert load(None) is None
    store(None, "symbol", b"code")
    with pytest.raises(ValueError, match=r"with the cache on \(CCE_CACHE_DIR\)"):
        precompile(make())


# Files


def read(path):
    return cubin_cache.read(path)


def test_what_is_written_is_read(directory):
    path, code = directory / "kernel.cce-cubin", bytes(range(256)) * 3
    assert read(path) is None
    store(path, "a symbol", code)
    assert read(path) == ("a symbol", code)
    store(path, "another", b"\n\n")
    assert read(path) == ("another", b"\n\n")
    assert list(directory.iterdir()) == [path]


def test_what_is_in_the_cache_is_told(directory, monkeypatch):
    assert cubin_cache.entries() == []
    assert disk.directory() == directory
    named = "cce_numba.simt.forward.make_lse_kernel(tiles=SimtTiles(...))"
    store(directory / "a.cce-cubin", "a symbol", bytes(1000), named, (9, 0))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "older sources")
    store(directory / "b.cce-cubin", "a symbol", bytes(10), "cce_numba.hopper.backward.kernel.make_it()", (10, 0))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "sources")
    (directory / "c.cce-cubin").write_bytes(b"no header\n")
    (directory / "d.cce-cubin").write_bytes(b"[]\n")
    (directory / "e.cce-cubin").write_bytes(b"{}\nof an older version")
    (directory / "foreign").write_bytes(b"{}\n")
    first, second, third = cubin_cache.entries()
    assert (first.kernel, first.package, first.compute_capability, first.is_current) == (named, "simt", "9.0", True)
    assert first.nbytes == first.path.stat().st_size > 1000
    assert (second.package, second.compute_capability, second.is_current) == ("hopper", "10.0", False)
    assert (third.kernel, third.package, third.is_current) == ("", "", False)


def test_why_nothing_is_kept(directory, monkeypatch, tmp_path):
    assert cubin_cache.why_unusable() is None
    monkeypatch.setattr(cubin_cache.os, "access", lambda path, mode: path != tmp_path)
    assert f"{tmp_path} cannot be written to" in cubin_cache.why_unusable()
    monkeypatch.setattr(cubin_cache, "_sources", lambda: None)
    assert "sources cannot be read, or one has changed" in cubin_cache.why_unusable()
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    assert "CCE_CACHE_DIR is empty" in cubin_cache.why_unusable()
    assert cubin_cache.entries() == []


@pytest.mark.parametrize("cut", [0, 10, 100, 400])
def test_a_damaged_file_is_deleted(directory, cut, caplog):
    path = directory / "kernel.cce-cubin"
    store(path, "symbol", bytes(500))
    path.write_bytes(path.read_bytes()[:cut])
    with caplog.at_level(logging.DEBUG):
        assert load(path) is None
    assert "damaged" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("content", [b"[]\n", b'{"symbol": "x"}\n', b"\xff\xfe", b"{", b"7F\n"])
def test_a_foreign_file_is_no_error(directory, content):
    directory.mkdir(parents=True)
    path = directory / "kernel.cce-cubin"
    path.write_bytes(content)
    assert load(path) is None


def test_what_the_driver_does_not_load_is_compiled_again(directory, caplog, monkeypatch):
    path = directory / "kernel.cce-cubin"
    store(path, "symbol", b"no machine code")

    def refuse():
        raise RuntimeError("no such image")

    monkeypatch.setattr(cubin_cache.cuda, "current_context", refuse)
    with caplog.at_level(logging.DEBUG):
        assert load(path) is None
    assert "does not load, so it is compiled again: no such image" in caplog.text
    assert not path.exists()


def test_a_file_is_there_whole_or_not_at_all(directory, monkeypatch):
    path = directory / "kernel.cce-cubin"
    store(path, "symbol", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cubin_cache.os, "replace", fail)
    store(path, "symbol", b"new")
    assert read(path) == ("symbol", b"old")
    assert list(directory.iterdir()) == [path], "and nothing is left behind"


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.DEBUG):
        store(tmp_path / "file" / "cache" / "kernel.cce-cubin", "symbol", b"code")
    assert "cannot be written" in caplog.text


def test_the_oldest_files_go_first(directory, monkeypatch):
    monkeypatch.setattr(cubin_cache, "MAX_BYTES", 3500)
    directory.mkdir(parents=True)
    (directory / "foreign").write_bytes(bytes(10000))
    paths = [directory / f"{i}.cce-cubin" for i in range(6)]
    for age, path in zip((5, 1, 4, 2, 3), paths[:5], strict=True):
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9 - age, 1e9 - age))
    store(paths[5], "symbol", bytes(1000))
    assert sorted(path.name for path in directory.iterdir()) == ["1.cce-cubin", "3.cce-cubin", "5.cce-cubin", "foreign"]
    store(paths[0], "symbol", bytes(9000))
    assert sorted(path.name for path in directory.iterdir()) == ["0.cce-cubin", "foreign"], "the newest stays in any case"


# Whose files


@pytest.fixture
def loads(monkeypatch):
    """Gives what `load` hands to the driver, in place of what the driver would make of it."""
    code = SimpleNamespace(from_cubin=lambda image: image)
    monkeypatch.setattr(cubin_cache.importlib, "import_module", lambda name: SimpleNamespace(ObjectCode=code))
    module = lambda image: SimpleNamespace(get_function=lambda symbol: (symbol, image))  # noqa: E731
    context = SimpleNamespace(create_module_image=module)
    monkeypatch.setattr(cubin_cache.cuda, "current_context", lambda: context)
    monkeypatch.setattr(disk, "_warned", set())
    return load


@pytest.mark.parametrize("path", ["", "kernel.cce-cubin"])
def test_what_others_can_write_to_is_not_loaded(directory, loads, path):
    kernel = directory / "kernel.cce-cubin"
    store(kernel, "symbol", b"code")
    assert loads(kernel) == ("symbol", b"code")
    (directory / path).chmod(0o770)
    with pytest.warns(RuntimeWarning, match="compiled kernels are neither loaded nor kept: .* other users"):
        assert loads(kernel) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(kernel) is None, "and no other warning tells"
        if not path:
            store(directory / "another.cce-cubin", "symbol", b"code")
    assert [file.name for file in directory.iterdir()] == ["kernel.cce-cubin"], "nothing is deleted, nothing is added"
    if not path:
        assert "other users" in cubin_cache.why_unusable()


def test_what_another_user_owns_is_loaded_if_the_caller_says_so(directory, loads, monkeypatch, tmp_path):
    shared = tmp_path / "shared"
    store(shared / "kernel.cce-cubin", "symbol", b"code")
    owner = os.geteuid()
    monkeypatch.setattr(disk.os, "geteuid", lambda: owner + 1)
    monkeypatch.setenv("CCE_CACHE_DIR", str(shared))
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert loads(shared / "kernel.cce-cubin") is None
    monkeypatch.setenv("CCE_SHARED_CACHE_DIR", str(shared))
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    assert path_of(make(), (9, 0)).parent == shared
    assert loads(directory / "kernel.cce-cubin") == loads(shared / "kernel.cce-cubin") == ("symbol", b"code")
    store(shared / "another.cce-cubin", "symbol", b"code")
    (shared / "kernel.cce-cubin").write_bytes(b"damaged")
    assert loads(shared / "kernel.cce-cubin") is None
    assert [file.name for file in shared.iterdir()] == ["kernel.cce-cubin"], "nothing is written, nothing is deleted"


# Without a device


def sections_of(code):
    """An ELF file's sections by name."""
    assert code[:4] == b"\x7fELF"
    (first,), (count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HH", code, 60)
    headers = [struct.unpack_from("<IIQQQQ", code, first + 64 * i) for i in range(count)]
    start_of_names = headers[names][4]
    return {
        code[start_of_names + name : code.index(b"\0", start_of_names + name)].decode(): code[start : start + size]
        for name, _, _, _, start, size in headers
    }


@pytest.mark.usefixtures("compiler")
def test_kernels_are_compiled_for_a_device_that_is_not_there(directory, monkeypatch):
    kernel = make_reduce_kernel()
    path = precompile(kernel)
    assert path == path_of(kernel, (9, 0))
    symbol, code = read(path)
    assert f".text.{symbol}" in sections_of(code)
    assert 90 in code[48:52], "sm_90, in the ELF header's flags"

    monkeypatch.setattr(Kernel, "build", lambda self: pytest.fail("compiled what is there"))
    assert precompile(kernel) == path
    assert cuda.dispatcher.get_current_device.__module__ == "numba.cuda.api", "nothing pretends any more"


@pytest.mark.usefixtures("compiler")
def test_registers_are_exchanged():
    """Linked otherwise, machine code would lack setmaxnreg, of which the kernel has two."""
    symbol, code = read(precompile(make_forward_kernel(HopperTiles(), BFLOAT16, None, False, False, (MAX_SUM,))))
    instructions = sections_of(code)[f".text.{symbol}"]
    kinds = [word & 0xFFF for (word,) in struct.iter_unpack("<H14x", instructions)]
    assert kinds.count(0x9C8) == 2, "USETMAXREG"


def test_what_is_not_kept_is_not_compiled_for_it():
    with pytest.raises(ValueError, match="kernel must be one that is kept"):
        precompile(make(identity=None))


# On a device


@pytest.fixture
def driver(monkeypatch):
    """Stands in for a device that loads everything: images that came, and attributes that were set."""
    images, attributes = [], []

    def create_module_image(code):
        images.append(code.code)
        return SimpleNamespace(get_function=lambda symbol: loaded(f"{symbol} out of a file"))

    def loaded(name):
        return SimpleNamespace(kernel=SimpleNamespace(handle=1000 + len(name)))

    def build(kernel):
        code = SimpleNamespace(get_cufunc=lambda: loaded("compiled"), get_cubin=lambda: SimpleNamespace(code=b"code"))
        return SimpleNamespace(entry_name="symbol", library=code)

    device = SimpleNamespace(compute_capability=(9, 0))
    numba = SimpleNamespace(gpus=[nullcontext()], get_current_device=lambda: device)
    monkeypatch.setattr(launch, "cuda", numba)
    monkeypatch.setattr(cubin_cache, "cuda", SimpleNamespace(current_context=lambda: context))
    context = SimpleNamespace(create_module_image=create_module_image)
    monkeypatch.setattr(Kernel, "build", build)
    monkeypatch.setattr(launch, "_set_attribute", lambda handle, device, name, value: attributes.append((handle, name, value)))
    return SimpleNamespace(images=images, attributes=attributes)


def test_the_first_kernel_writes_what_the_second_loads(driver, directory):
    shape = {"cluster": 2, "smem_bytes": 50000}
    compiled, from_file = 1000 + len("compiled"), 1000 + len("symbol out of a file")
    assert make(**shape)._compile(0)[0] == compiled
    (path,) = directory.iterdir()
    assert read(path) == ("symbol", b"code")
    assert driver.images == []
    assert make(**shape)._compile(0)[0] == from_file
    assert driver.images == [b"code"]
    for handle, seen in ((compiled, driver.attributes[:4]), (from_file, driver.attributes[4:])):
        assert seen == [
            (handle, "MAX_DYNAMIC_SHARED_SIZE_BYTES", 50000),
            (handle, "REQUIRED_CLUSTER_WIDTH", 2),
            (handle, "REQUIRED_CLUSTER_HEIGHT", 1),
            (handle, "REQUIRED_CLUSTER_DEPTH", 1),
        ]


def test_a_kernel_without_an_identity_is_compiled_each_time(driver, directory):
    for _ in range(2):
        assert make(identity=None)._compile(0)[0] == 1000 + len("compiled")
    assert not directory.exists()


def make_far_kernel():
    """out[cta] = its rank in its cluster and a number that went through the last of 64 KiB shared memory."""
    last = 64 * 1024 // 4 - 1

    def far_kernel(value, out):
        numbers = cuda.shared.array(0, np.int32)
        if cuda.threadIdx.x == 0:
            numbers[last] = value
        cuda.syncthreads()
        if cuda.threadIdx.x == 31:
            out[cuda.blockIdx.x] = numbers[last] + np.int32(cluster.cta_rank())

    shape = {"threads": 32, "cluster": 2, "smem_bytes": 64 * 1024}
    return make(function=far_kernel, parameters=(types.int32, pointer_to(np.int32)), identity="far", **shape)


def make_near_kernel():
    def near_kernel(value, out):
        out[cuda.blockIdx.x] = value + cuda.blockIdx.x % 2

    return make(function=near_kernel, parameters=(types.int32, pointer_to(np.int32)), identity="near")


@pytest.fixture
def cupy(gpu):
    import cupy

    if cupy.cuda.runtime.getDeviceProperties(0)["major"] != 9:
        pytest.skip("clusters need compute capability 9.x")
    return cupy


@pytest.mark.gpu
@pytest.mark.parametrize("make_kernel", [make_near_kernel, make_far_kernel])
def test_a_second_process_would_not_compile(cupy, directory, monkeypatch, make_kernel):
    def launched():
        out = cupy.full(6, -1, np.int32)
        make_kernel().launch(6, 70, out.data.ptr)
        np.testing.assert_array_equal(out.get(), [70, 71] * 3)

    launched()
    (path,) = directory.iterdir()
    written = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "build", lambda self: pytest.fail("compiled what is there"))
        launched()
    # Whole by its digest, but nothing that a driver loads: compiled and written again.
    store(path, "symbol", b"\x7fELF but no more")
    launched()
    assert read(path)[1][:4] == written.partition(b"\n")[2][:4]
    assert len(read(path)[1]) > 1000


@pytest.mark.gpu
def test_a_device_takes_what_was_compiled_without_one(cupy, directory, monkeypatch):
    precompile(make_far_kernel())
    monkeypatch.setattr(Kernel, "build", lambda self: pytest.fail("compiled what is there"))
    out = cupy.full(4, -1, np.int32)
    make_far_kernel().launch(4, 5, out.data.ptr)
    np.testing.assert_array_equal(out.get(), [5, 6, 5, 6])


@pytest.mark.gpu
def test_a_cache_that_is_off_compiles(cupy, directory, monkeypatch):
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    out = cupy.full(2, -1, np.int32)
    make_near_kernel().launch(2, 5, out.data.ptr)
    np.testing.assert_array_equal(out.get(), [5, 6])
    assert not directory.exists()
