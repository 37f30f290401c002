"""Tiles as pure functions, and what the shipped kernels take when compiled for architectures that are not here.

`python -m varlik.kernels.resources` compiles every kernel for five architectures in three dtypes; here it is done for
the shapes of var-d16 and the bundled models on two architectures, and in full where VARLIK_ALL_KERNELS=1 is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from varlik.ops import _registry

if not _registry.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from varlik.kernels import (
    _catalogue,
    _compile,
    _launch,
    linear,
    nearest_code,
    qk_norm,
    resources,
    scale_causal_attention,
    scale_causal_attention_backward,
    token_log_prob,
)
from varlik.kernels._tiles import SHARED_MEMORY, Limits

BOUNDARIES = _catalogue.BOUNDARIES
LIMITS = [Limits.of_architecture(architecture) for architecture in SHARED_MEMORY]
each_device = pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: f"sm_{limits.architecture}")


@each_device
@pytest.mark.parametrize("itemsize", [2, 4])
def test_pipelines_fit_shared_memory(limits, itemsize):
    for outputs, width in ((24, 16), (384, 128), (4096, 1024), (8192, 8192)):
        tiles = linear._tiles(outputs, width, itemsize, limits)
        assert tiles.stages * (tiles.m + tiles.n) * tiles.k * itemsize <= limits.shared_memory
    tiles = token_log_prob._tiles(itemsize, limits)
    assert tiles.stages * (tiles.m + tiles.n) * tiles.k * itemsize <= limits.shared_memory
    for head_dim in (32, 64, 128):
        tiles = scale_causal_attention.tiles_of(head_dim, itemsize, limits)
        assert (tiles.m + 2 * tiles.stages * tiles.n) * head_dim * itemsize <= limits.shared_memory
        assert tiles.m <= 64
        assert tiles.n <= 64
        backward = scale_causal_attention_backward._tiles(head_dim, itemsize, limits)
        assert 3 * (backward.m + backward.n) * head_dim * itemsize <= limits.shared_memory


@each_device
def test_widths_are_covered(limits):
    for width in (1, 16, 33, 128):
        assert qk_norm._tiles(width, limits).k >= width
        assert nearest_code._tiles(width, limits).k >= width


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_tiles_do_not_depend_on_rows(rows):
    """So that a row's score does not either."""

    def launches(rows):
        hidden, weight = torch.empty(rows, 5, 64, device="meta"), torch.empty(300, 64, device="meta")
        bias, targets = torch.empty(300, device="meta"), torch.empty(rows, 5, dtype=torch.int64, device="meta")
        with _launch.recording(LIMITS[0]) as found:
            linear.linear(hidden, weight, bias, "none")
            token_log_prob.scale_log_prob(hidden, weight, bias, targets, [0, 1, 5])
        return [(launch.tiles, launch.constants) for launch in found]

    assert launches(rows) == launches(2)


@each_device
@pytest.mark.parametrize("itemsize", [2, 4])
def test_dead_work_of_attention_is_bounded(limits, itemsize):
    tiles = scale_causal_attention.tiles_of(64, itemsize, limits)
    attended, computed = scale_causal_attention.work(BOUNDARIES, BOUNDARIES[-1], tiles)
    assert attended == 286_434
    assert attended <= computed < 1.25 * attended


@pytest.mark.parametrize("start", BOUNDARIES[:-1])
@pytest.mark.parametrize("size", [16, 64])
def test_query_tiles_cover_every_query_once(start, size):
    tokens = BOUNDARIES[-1] - start
    tiles = scale_causal_attention.query_tiles(BOUNDARIES, tokens, size)
    assert [t for first, end, _ in tiles for t in range(first, end)] == list(range(tokens))
    ends = scale_causal_attention.key_ends(BOUNDARIES, tokens)
    for number, (first, end, keys) in enumerate(tiles):
        assert end - first <= size
        assert keys == max(ends[first:end])
        assert number == 0 or len(set(ends[first:end])) == 1  # only the first may merge scales


@pytest.mark.parametrize("codes", [1, 127, 128, 1024, 1025, 4096, 16_384, 65_536])
@pytest.mark.parametrize("tile", [64, 128])
def test_splits_cover_the_vocabulary(codes, tile):
    count, size = token_log_prob._splits(codes, tile)
    assert size % tile == 0
    assert (count - 1) * size < codes <= count * size
    assert count <= token_log_prob.MAX_SPLITS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiles_what_the_jit_would(dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 80, 32))
    for problem, launch in _catalogue.recorded(_catalogue.BUNDLED, dtype, LIMITS[0]):
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, found, _ = bind(**launch.arguments, **launch.constants)
        ours = _compile.Compilation.of_launch(launch, 80)
        assert [kind for kind, _ in found] == [kind for _, kind in ours.signature], problem
        aligned = [i for i, (kind, trait) in enumerate(found) if kind != "constexpr" and trait]
        assert aligned == list(ours.aligned), problem
        assert all(found[i][1] == value for i, value in ours.constants), problem


def test_shared_tiles_of_attention_are_in_the_catalogue():
    """How many rows share a tile is compiled in, so every such number has to be looked at."""
    for model in (*_catalogue.USUAL, *_catalogue.OTHERS):
        for dtype in resources.DTYPES.values():
            attention = [
                launch
                for _, launch in _catalogue.recorded(model, dtype, LIMITS[0])
                if launch.kernel.fn.__name__ == "_attention_kernel"
            ]
            tokens = {1, 4, 8, 16, 32, 64}  # of a scale, or of the leading ones, to the next power of two
            size = attention[0].tiles.m
            assert {launch.constants["ROWS"] for launch in attention} == {max(1, size // t) for t in tokens}


DEFINITION = re.compile(r"^\s*(%\w+)(?::\d+)? = ([\w.]+) (.*)$", re.MULTILINE)
SHAPING = {"tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"}
SUMS = {"arith.addi", "arith.subi"}
# Offsets within a slot and within a weight, whose factors are both small.
NARROW = {"linear.linear": 1}


def narrow_products(ttir):
    """Products of two variables in 32 bits that an address is computed from."""
    definitions = {}
    for name, operation, rest in DEFINITION.findall(ttir):
        operands, _, kind = rest.split(" loc(")[0].partition(" : ")
        definitions[name] = operation, re.findall(r"%\w+", operands), kind

    def is_constant(name):
        operation, operands, _ = definitions.get(name, ("", [], ""))
        return operation == "arith.constant" or (operation in SHAPING and is_constant(operands[0]))

    found, seen = set(), set()

    def visit(name):
        if name in seen or name not in definitions:
            return
        seen.add(name)
        operation, operands, kind = definitions[name]
        if operation == "arith.muli" and kind.endswith(("i32", "i32>")) and not any(map(is_constant, operands)):
            found.add(name)
        if operation in SHAPING | SUMS | {"arith.muli"}:
            for operand in operands:
                visit(operand)

    offsets = [operands[1] for operation, operands, _ in definitions.values() if operation == "tt.addptr"]
    assert offsets
    for offset in offsets:
        visit(offset)
    return found


@pytest.mark.slow
def test_products_of_sizes_take_64_bits():
    """In every address; what remains in 32 bits are products with a constant."""
    kinds = {}
    for _, _, compilation in resources.collect([80], ["float16"], usual=True):
        kinds.setdefault((compilation.name, compilation.signature), compilation)
    for (name, _), compilation in kinds.items():
        assert len(narrow_products(compilation.compile().asm["ttir"])) <= NARROW.get(name, 0), name


def test_narrow_products_are_seen():
    ttir = """
      %c4 = arith.constant 4 : i32 loc(#loc1)
      %row = tt.get_program_id x : i32 loc(#loc1)
      %block = arith.muli %row, %c4 : i32 loc(#loc1)
      %place = arith.muli %block, %stride : i32 loc(#loc1)
      %wide = arith.extsi %place : i32 to i64 loc(#loc1)
      %at = tt.addptr %x_ptr, %wide : !tt.ptr<f32>, i64 loc(#loc1)
    """
    assert narrow_products(ttir) == {"%place"}
    assert (
        narrow_products(ttir.replace("%place = arith.muli %block, %stride : i32", "%place = arith.addi %block"))
        == set()
    )


@pytest.mark.slow
def test_shipped_kernels_are_within_budget():
    everything = os.environ.get("VARLIK_ALL_KERNELS") == "1"
    architectures = list(SHARED_MEMORY) if everything else [80, 90]
    wanted = resources.collect(architectures, list(resources.DTYPES), usual=not everything)
    assert {compilation.name for *_, compilation in wanted} >= set(resources.HOT)
    broken = [(entry, found) for entry in resources.examine(wanted) if (found := resources.breaches(entry))]
    assert not broken


@pytest.mark.slow
def test_other_architectures_compile_what_a_pass_spends_its_time_in():
    wanted = [
        (problem, dtype, compilation)
        for problem, dtype, compilation in resources.collect([86, 89, 100], ["float16", "bfloat16"], usual=True)
        if compilation.name in resources.HOT and "var-d16" in problem and "alone" not in problem
    ]
    broken = [(entry, found) for entry in resources.examine(wanted) if (found := resources.breaches(entry))]
    assert not broken


def test_amd_compiles():
    wanted = resources.collect([resources.AMD], ["float16"], "attention.attention", usual=True)[:1]
    wanted += resources.collect([resources.AMD], ["float16"], "token_log_prob.split", usual=True)[:1]
    for problem, dtype, compilation in wanted:
        usage = _compile.usage(compilation)
        assert isinstance(usage, _compile.Usage), usage
        assert "compiles" in resources.line_of(resources.Entry(problem, dtype, compilation, usage))


def small_entry(**usage):
    problem, dtype, compilation = resources.collect([86], ["float16"], "token_log_prob.split", usual=True)[0]
    good = _compile.Usage(64, 0, 0, 4096, 0, 8, 8, 0, half_dot=True)
    return resources.Entry(problem, dtype, compilation, replace(good, **usage))


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        ({}, []),
        ({"stack": 8}, ["spills 8 bytes of registers"]),
        ({"local_memory": 1}, ["spills 0 bytes of registers"]),
        ({"shared": 101_377}, ["wants 101377 bytes of shared memory, of 101376"]),
        ({"tensor_memory": 1024}, ["wants 1024 columns of tensor memory, of 512"]),
        ({"tensor_core": 0}, ["does a product of 16-bit floats without tensor cores"]),
        ({"wide_loads": 0}, ["has no load of 16 bytes"]),
    ],
)
def test_breaches(usage, words):
    assert resources.breaches(small_entry(**usage)) == words


def test_a_broken_budget_ends_the_command(monkeypatch, capsys):
    """Tiles too large for shared memory and registers, really compiled."""
    shipped = token_log_prob._tiles(2, Limits.of_architecture(86))
    monkeypatch.setattr(token_log_prob, "_tiles", lambda *_: replace(shipped, n=256, warps=4, stages=4))
    monkeypatch.setattr(
        resources, "examine", lambda wanted: [resources.Entry(*w, _compile.usage(w[-1])) for w in wanted[:1]]
    )
    command = ["resources", "--arch", "86", "--dtype", "float16", "--kernel", "token_log_prob.split", "--usual"]
    monkeypatch.setattr(sys, "argv", command)
    assert resources.main() == 1
    printed = capsys.readouterr().out
    assert "bytes of shared memory, of 101376" in printed
    assert "Predicted from data sheets, not measured" in printed


@pytest.mark.parametrize(("option", "value"), [("--arch", "70"), ("--arch", "x"), ("--dtype", "float64")])
def test_refuses_options(option, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resources", option, value])
    with pytest.raises(SystemExit):
        resources.main()
    assert f"{option}: expected" in capsys.readouterr().err


def test_refuses_a_kernel_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resources", "--usual", "--arch", "80", "--kernel", "nonesuch"])
    with pytest.raises(SystemExit):
        resources.main()
    assert "--kernel: no kernel has 'nonesuch' in its name" in capsys.readouterr().err


def test_says_what_it_lacks():
    """One line where triton is absent, and where the interpreter stands in for the compiler."""
    module = "varlik.kernels.resources"
    absent = f"import sys, runpy; sys.modules['triton'] = None; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", absent], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{module}: triton is not installed, and nothing can be compiled without it",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_occupancy():
    usage = _compile.Usage(128, 0, 0, 40 << 10, 0, 0, 0, 0, half_dot=False)
    assert _compile.occupancy(80, usage, warps=4) == (4, "registers")
    assert _compile.occupancy(86, usage, warps=4) == (2, "shared memory")


def test_rooflines_are_of_the_stated_problem():
    found = {item.name: item for item in resources.rooflines()}
    pairs = sum((b - a) * b for a, b in pairwise(BOUNDARIES) if a >= 91)
    assert found["scale_causal_attention"].tflop == pytest.approx(4 * 100 * 1024 * pairs / 1e12)
    assert found["linear qkv"].tflop == pytest.approx(2 * 100 * 589 * 1024 * 3072 / 1e12)
