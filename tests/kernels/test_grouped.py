"""`grouped` against the float64 oracle: rows of experts, on every backend, with the bounds of
`test_functional`.

What is padding is filled with NaN, in x, dy and the weights: whatever reads it shows.
"""

import itertools
import types
from collections.abc import Iterator

import pytest
import torch
from interpreter import like_hardware
from test_functional import (
    DTYPES,
    NAMES,
    GraphCounter,
    assert_within,
    largest_slope_term,
    largest_term,
    nan_filled_memory,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_xielu import functional, grouped
from megatron_xielu.kernels import (
    choose,
    eager,
    gpu_triton,
    grouped_loop,
    grouped_triton,
    reference,
)

ON_BACKENDS = pytest.mark.usefixtures("backend")
BOTH = pytest.mark.parametrize("name", NAMES)
NAN = float("nan")
INTERPRETED = not torch.cuda.is_available()

# Of each expert: its tokens, and the rows that it takes, if those are more.
CASES: dict[str, tuple[list[int], list[int] | None]] = {
    "uneven": ([3, 1, 11, 2], None),
    "one expert": ([9], None),
    "one row": ([1], None),
    "no rows": ([0], None),
    "all empty": ([0, 0, 0], None),
    "first and last empty": ([0, 0, 5, 0, 4, 0], None),
    "more experts than rows": ([0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0], None),
    "padded": ([3, 0, 7, 1], [4, 0, 8, 4]),
    "padded when empty": ([0, 2, 0, 0], [3, 2, 0, 4]),
    "padding alone": ([0, 0], [2, 1]),
    # Of programs' rows, in the interpreter: a part of the first's, all of others, and a part.
    "over many programs": ([2, 37, 1], [3, 40, 1]),
}


def alphas_of(experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """No two neighbours have the same."""
    raws = (0.2, -1.1, 1.1, -5.0, 0.0, 20.0)
    of_p = [raws[expert % 6] for expert in range(experts)]
    of_n = [raws[(expert + 1) % 5] for expert in range(experts)]
    return [torch.tensor(of_p, dtype=dtype), torch.tensor(of_n, dtype=dtype)]


def inputs_of(
    case: str, cols: int, dtype: torch.dtype, after: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, weights in float64, and ranges; `after` rows come after the last expert's."""
    tokens, taken = CASES[case]
    rows = sum(taken or tokens) + after
    torch.manual_seed(rows + cols)
    x, dy = (torch.randn(2, rows, cols, dtype=torch.float64) * 2).to(dtype)
    weights = torch.rand(rows, dtype=torch.float64)
    x.requires_grad_()
    ranges = grouped._ranges(x, tokens, taken)
    padding = ~is_real(ranges, rows)
    for tensor in (x.detach(), dy, weights):
        tensor[padding] = NAN
    return x, dy, weights, ranges


def is_real(ranges: Tensor, rows: int) -> Tensor:
    """Which rows are an expert's tokens."""
    row = torch.arange(rows)[:, None]
    return ((row >= ranges[0]) & (row < ranges[1])).any(1)


def slices(ranges: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (start, end) in enumerate(ranges.t().tolist()):
        yield expert, slice(start, end)


def run(
    name: str, x: Tensor, alphas: list[Tensor], case: str, dy: Tensor, weights: Tensor | None
) -> list[Tensor]:
    """y, and the gradients of x, both alphas and the weights."""
    tokens, taken = CASES[case]
    inputs = [t.detach().requires_grad_() for t in (x, *alphas)]
    if weights is not None:
        weights = weights.detach().requires_grad_()
        inputs.append(weights)
    function = getattr(grouped, f"grouped_{name}")
    y = function(*inputs[:3], tokens, row_weights=weights, rows_per_expert=taken)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    gradients = torch.autograd.grad(y, inputs, dy)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in inputs]
    return [y.detach(), *gradients]


def check(
    name: str,
    case: str,
    cols: int,
    dtype: torch.dtype,
    weights_of: tuple[torch.dtype, tuple[int, ...]] | None = None,
    alpha_dtype: torch.dtype = torch.float32,
    after: int = 0,
) -> None:
    """`weights_of`: dtype, and what comes after the number of rows in their shape."""
    x, dy, weights, ranges = inputs_of(case, cols, dtype, after)
    alphas = alphas_of(ranges.shape[1], alpha_dtype)
    given = None
    if weights_of is not None:
        given = weights.to(weights_of[0]).reshape(-1, *weights_of[1])
    y, dx, *d_alphas_and_weights = run(name, x, alphas, case, dy, given)
    check_values(name, x.detach(), dy, alphas, ranges, given, y, dx, *d_alphas_and_weights)


def check_values(
    name: str,
    x: Tensor,
    dy: Tensor,
    alphas: list[Tensor],
    ranges: Tensor,
    weights: Tensor | None,
    y: Tensor,
    dx: Tensor,
    *sums: Tensor,
) -> None:
    """Results against the oracle; `sums` are the gradients of alphas and weights."""
    real = is_real(ranges, len(x))
    d_weights = sums[2] if weights is not None else None
    for tensor in (y, dx, *([] if d_weights is None else [d_weights])):
        assert torch.equal(tensor[~real], torch.zeros_like(tensor[~real]))
    exact_y = reference.grouped(name, x, *alphas, ranges, weights)
    exact_dx, *exact_sums = reference.grouped_backward(name, dy, x, *alphas, ranges, weights)
    for expert, rows in slices(ranges):
        pair = alphas[0][expert], alphas[1][expert]
        scale = torch.ones(rows.stop - rows.start, 1, dtype=torch.float64)
        if weights is not None:
            scale = weights[rows].double().reshape(-1, 1)
        term = largest_term(name, x[rows], *pair)
        # A weight's product is one more rounding in float32.
        product = 0.25 * exact_y[rows].abs() if weights is not None else 0.0
        assert_within(y[rows], exact_y[rows], scale * term + product)
        upstream = (scale * dy[rows].double()).abs()
        slope_term = largest_slope_term(name, x[rows], *pair)
        assert_within(dx[rows], exact_dx[rows], 2.0 * upstream * slope_term)
        sizes = getattr(reference, f"{name}_backward")(upstream, x[rows], *pair)[1:]
        for got, exact, size in zip(sums, exact_sums, sizes, strict=False):
            if rows.start == rows.stop:
                assert got[expert].item() == 0.0
            assert_sums(got[expert], exact[expert], size)
        if d_weights is not None:
            size = (dy[rows].double().abs() * term).sum(1).view_as(d_weights[rows])
            assert_sums(d_weights[rows], exact_sums[2][rows], size)


def assert_sums(got: Tensor, exact: Tensor, sizes: Tensor) -> None:
    """As the dense gradients of alphas: to rounding, and 1e-6 of the sums of magnitudes."""
    info = torch.finfo(got.dtype)
    bound = 0.51 * info.eps * exact.abs() + 1e-6 * sizes + info.smallest_normal
    got, exact = (t.double().clamp(-info.max, info.max) for t in (got, exact))
    wrong = ~((got - exact).abs() <= bound)
    assert not wrong.any(), (got[wrong][:4], exact[wrong][:4], bound[wrong][:4])


@ON_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@BOTH
def test_against_the_oracle(name: str, case: str, dtype: torch.dtype) -> None:
    """Every case of rows; columns, kinds of weights and of alphas take turns."""
    kinds = [None, *itertools.product({torch.float32: 1, dtype: 1}, ((), (1,)))]
    turn = list(CASES).index(case)
    for number, cols in enumerate((1, 7, 300)):
        some = [None, kinds[1 + (turn + number) % (len(kinds) - 1)]]
        alpha_dtype = dtype if (turn + number) % 2 else torch.float32
        for place, kind in enumerate(kinds if cols == 7 else some):
            check(name, case, cols, dtype, kind, alpha_dtype, after=3 * (place % 2))


@ON_BACKENDS
@pytest.mark.parametrize("cols", [256, 1408, 2048])
@BOTH
def test_columns_of_models(name: str, cols: int) -> None:
    """Several tiles of columns, the last one cut or not."""
    for dtype, kind in itertools.product(DTYPES[1:3], (None, (torch.float32, ()))):
        check(name, "padded", cols, dtype, kind)


@ON_BACKENDS
@BOTH
def test_256_experts(name: str) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 3, (256,)).tolist()
    CASES["256"] = tokens, None
    try:
        check(name, "256", 5, torch.bfloat16, (torch.float32, ()), after=2)
    finally:
        del CASES["256"]


@ON_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_the_same_bits_again(name: str, dtype: torch.dtype) -> None:
    x, dy, weights, ranges = inputs_of("over many programs", 300, dtype)
    for given in (None, weights.float()):
        runs = [
            run(name, x, alphas_of(ranges.shape[1]), "over many programs", dy, given)
            for _ in range(3)
        ]
        for again in runs[1:]:
            assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_the_bits_of_one_call_for_each_expert(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, where the loop computes: eager, whose order of sums is its input's."""
    monkeypatch.setenv(choose.VARIABLE, "eager")
    x, dy, _, ranges = inputs_of("padded", 300, dtype)
    alphas = alphas_of(ranges.shape[1])
    y, dx, *d_alphas = run(name, x, alphas, "padded", dy, None)
    for expert, rows in slices(ranges):
        inputs = [
            t.detach().clone().requires_grad_() for t in (x[rows], *(a[expert] for a in alphas))
        ]
        dense = getattr(functional, name)(*inputs)
        expected = torch.autograd.grad(dense, inputs, dy[rows])
        got = dx[rows], *(d_alpha[expert] for d_alpha in d_alphas)
        assert torch.equal(y[rows], dense)
        assert all(map(torch.equal, got, expected))


@ON_BACKENDS
@BOTH
def test_nan_and_infinities_stay_with_their_expert(name: str) -> None:
    """Of x, of dy, of a weight and of an alpha; x = -inf gives +inf also to its weight."""
    case = "padded"
    for what in ("x", "dy", "weights", "alpha"):
        x, dy, weights, ranges = inputs_of(case, 7, torch.float32)
        alphas, weights = alphas_of(ranges.shape[1]), weights.float()
        clean = run(name, x, alphas, case, dy, weights)
        row, expert = 4, 2  # its first
        target = {"x": x.detach(), "dy": dy, "weights": weights, "alpha": alphas[0]}[what]
        target[expert if what == "alpha" else row] = NAN
        found = run(name, x, alphas, case, dy, weights)
        others = torch.arange(len(alphas[0])) != expert
        rows = torch.ones(len(x), dtype=torch.bool)
        rows[slice(*ranges[:, expert].tolist())] = False
        for number, (got, expected) in enumerate(zip(found, clean, strict=True)):
            kept = others if number in (2, 3) else rows
            assert torch.equal(got[kept], expected[kept]), what
        assert found[2][expert].isnan(), what
    x, dy, weights, ranges = inputs_of(case, 7, torch.float32)
    x.detach()[4, 0], dy[4] = -float("inf"), 1.0
    y, *_, d_weights = run(name, x, alphas_of(ranges.shape[1]), case, dy, weights.float())
    assert y[4, 0] == d_weights[4] == float("inf")


@ON_BACKENDS
@BOTH
def test_every_element_of_every_result_is_written(name: str) -> None:
    for case in ("padded", "padded when empty", "all empty", "over many programs"):
        x, dy, weights, ranges = inputs_of(case, 30, torch.bfloat16, after=5)
        with nan_filled_memory():
            results = run(name, x, alphas_of(ranges.shape[1]), case, dy, weights.float())
        assert all(t.isfinite().all() for t in results)


@ON_BACKENDS
def test_strides_and_an_expanded_gradient() -> None:
    """Contiguous or not: the same bits."""
    case = "padded"
    x, dy, weights, ranges = inputs_of(case, 12, torch.bfloat16)
    alphas, weights = alphas_of(ranges.shape[1]), weights.float()

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0]

    expected = run("xielu", x, alphas, case, dy, weights)
    got = run("xielu", *(spread(x), [spread(a) for a in alphas], case, spread(dy), spread(weights)))
    assert all(map(torch.equal, got, expected))
    one = torch.ones((), dtype=x.dtype).expand(x.shape)
    expected = run("xielu", x, alphas, case, one.contiguous(), weights)
    assert all(
        map(torch.equal, run("xielu", x.mT.contiguous().mT, alphas, case, one, weights), expected)
    )


@ON_BACKENDS
@BOTH
def test_counts_in_tensors_and_lists(name: str) -> None:
    """The same ranges, whatever they are given in; on the device they are cut to what fits."""
    x = torch.randn(20, 3)
    tokens, taken = CASES["padded"]
    for given in (None, taken):
        expected = grouped._ranges(x, tokens, given)
        for kind in (torch.int64, torch.int32):
            as_tensors = [
                None if c is None else torch.tensor(c, dtype=kind) for c in (tokens, given)
            ]
            assert torch.equal(grouped._ranges(x, *as_tensors), expected)
        alphas = alphas_of(4)
        function = getattr(grouped, f"grouped_{name}")
        results = [
            function(x, *alphas, kind(tokens), rows_per_expert=given)
            for kind in (list, tuple, torch.tensor, lambda c: torch.tensor(c, device="cpu"))
        ]
        assert all(torch.equal(result, results[0]) for result in results)
    cut = grouped._ranges(x, torch.tensor([5, -3, 2**62, 2**62, 7]), None)
    assert cut.tolist() == [[0, 5, 5, 25, 45], [5, 5, 25, 45, 52]]
    cut = grouped._ranges(x, torch.tensor([5, 9]), torch.tensor([3, -1]))
    assert cut.tolist() == [[0, 3], [3, 3]]


BAD_RANGES = [
    [[0, 5, 5, 25, 45], [5, 5, 25, 45, 52]],
    [[0, -7, 3, 2**60, -(2**60)], [30, -9, 2**61, 5, -1]],
    [[12, 3, 11, 0, 5], [40, 1, 2, 3, 4]],
    [[-5, -4, -3, -2, -1], [2**62] * 5],
]


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD_RANGES)
@BOTH
def test_ranges_that_do_not_fit_touch_nothing_else(
    name: str, bad: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels write the results and nothing around them, and read nothing around x."""
    monkeypatch.setenv(choose.VARIABLE, "triton")
    rows, cols, margin = 20, 6, 40
    device = "cpu" if INTERPRETED else "cuda"

    def surrounded(*shape: int) -> tuple[Tensor, Tensor]:
        """A tensor in the middle of one that is full of NaN, and the whole."""
        whole = torch.full((margin + shape[0] + margin, *shape[1:]), NAN, device=device)
        middle = whole[margin : margin + shape[0]]
        middle.copy_(torch.randn(shape))
        return middle, whole

    made: list[Tensor] = []

    def empty(shape: tuple[int, ...], **kwargs: object) -> Tensor:
        middle, whole = surrounded(*shape)
        made.append(whole)
        return middle

    memory = types.SimpleNamespace(
        empty=empty, empty_like=lambda tensor: empty(tensor.shape), float32=torch.float32
    )
    monkeypatch.setattr(grouped_triton, "torch", memory)
    (x, _), (dy, _), (weights, _) = surrounded(rows, cols), surrounded(rows, cols), surrounded(rows)
    alphas = [surrounded(5)[0] for _ in range(2)]
    ranges = torch.tensor(bad, device=device)
    with like_hardware():
        kernels = grouped_triton.Kernels(ranges)
        y = kernels.forward(name, x, *alphas, 0.5, weights)
        results = kernels.backward(name, dy, x, *alphas, 0.5, weights)
    assert len(made) == 1 + 5
    for whole in made:
        assert whole[:margin].isnan().all() and whole[-margin:].isnan().all()
    for tensor in (y, *results):
        assert tensor.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("has_weights", [False, True])
@BOTH
def test_offsets_beyond_31_bits(name: str, has_weights: bool) -> None:
    """A program's last row is 2^31 elements away, in memory of which only it is ever touched."""
    from triton.runtime.interpreter import GridExecutor

    device = "cpu" if INTERPRETED else "cuda"
    cols = 2**11
    far = 2**31 // cols + 1
    x, dy, y, dx = (
        torch.empty(far + 2, cols, dtype=torch.bfloat16, device=device) for _ in range(4)
    )
    weights, d_weights = torch.empty(2, far + 2, device=device)
    for tensor in (x, dy, weights):
        tensor[far] = torch.randn(tensor[far].shape)
    alphas = [a.to(device) for a in alphas_of(1)]
    ranges = torch.tensor([[far], [far + 1]], device=device)
    sums = torch.empty(2, 2, device=device)
    arguments = {
        "x_ptr": x,
        "weights_ptr": weights if has_weights else None,
        "alpha_p_ptr": alphas[0],
        "alpha_n_ptr": alphas[1],
        "ranges_ptr": ranges,
        "rows": far + 2,
        "cols": cols,
        "rows_per_program": far + 2,
        "experts": 1,
        "beta": 0.5,
        "NAME": name,
        "HAS_WEIGHTS": has_weights,
        "EXPERTS": 1,
        **grouped_triton.tile(2, has_weights),
    }
    with pytest.MonkeyPatch.context() as patch, like_hardware():
        # The interpreter would copy every argument back to where it already is.
        patch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        grouped_triton._forward_kernel[(1,)](y_ptr=y, **arguments)
        grouped_triton._backward_kernel[(1,)](
            dy_ptr=dy,
            dx_ptr=dx,
            d_weights_ptr=d_weights if has_weights else None,
            alpha_sums_ptr=sums,
            **arguments,
        )
    row, given = slice(far, far + 1), weights[far : far + 1] if has_weights else None
    here = torch.tensor([[0], [1]])
    exact_y = reference.grouped(name, x[row], *alphas, here, given)
    exact = reference.grouped_backward(name, dy[row], x[row], *alphas, here, given)
    torch.testing.assert_close(y[row].double(), exact_y, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dx[row].double(), exact[0], rtol=2**-8, atol=1e-6)
    assert torch.equal(y[far + 1], torch.zeros_like(y[0]))
    if has_weights:
        torch.testing.assert_close(d_weights[row].double(), exact[3], rtol=1e-5, atol=1e-5)
        assert d_weights[far + 1] == 0.0
    if not INTERPRETED:  # 16 GiB that the tests beside it may need
        del x, dy, y, dx
        torch.cuda.empty_cache()


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_programs_cover_every_row_once(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_triton, "_multiprocessors", lambda device: multiprocessors)
    ranges = torch.empty(2, 64, device="meta")
    for rows, cols in (
        (0, 4),
        (1, 1),
        (5, 0),
        (1000, 7),
        (16384, 1408),
        (2**20, 2**20),
        (3, 2**29),
    ):
        x = torch.empty(rows, cols, dtype=torch.bfloat16, device="meta")
        layout = grouped_triton._Layout(x, ranges, False, {False: 9})
        each = layout.sizes["rows_per_program"]
        assert (layout.programs - 1) * each < max(rows, 1) <= layout.programs * each
        assert each * cols <= grouped_triton.MOST_ELEMENTS or each == 1
        if rows * cols < 2**30:
            assert layout.programs <= max(9 * multiprocessors, 1)
        assert layout.slots == layout.programs + 64
    with pytest.raises(
        ValueError, match=r"^x must have fewer than 2\^30 rows and columns, not 2 x "
    ):
        x = torch.empty(2, 2**30, device="meta")
        grouped_triton._Layout(x, ranges, False, {False: 9})


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    small, large, ranges = torch.zeros(4, 4), torch.zeros(2**9, 2**8), torch.zeros(2, 1)
    for x in (small, large, small.double()):
        loop = choose.choose_grouped(x, ranges)
        assert isinstance(loop, grouped_loop.Loop) and loop.dense is choose.choose(x)
    monkeypatch.setenv(choose.VARIABLE, "eager")
    assert choose.choose_grouped(large, ranges).dense is eager
    monkeypatch.setenv(choose.VARIABLE, "triton")
    assert isinstance(choose.choose_grouped(small, ranges), grouped_triton.Kernels)


@ON_BACKENDS
@BOTH
def test_saves_its_inputs_and_nothing_else(name: str) -> None:
    saved: list[Tensor] = []
    x, _, weights, ranges = inputs_of("padded", 4, torch.bfloat16)
    alphas = [a.requires_grad_() for a in alphas_of(4)]
    weights = weights.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator = getattr(torch.ops.megatron_xielu, f"grouped_{name}")
        operator(x, *alphas, 0.5, weights, ranges)
    expected = [x, *alphas, weights, ranges]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


@ON_BACKENDS
@BOTH
def test_compiles_to_one_operator_for_every_count(name: str) -> None:
    """Counts in a tensor: one graph, forward and backward, with the bits of no compiler."""
    torch._dynamo.reset()
    counter = GraphCounter()
    function = getattr(grouped, f"grouped_{name}")
    alphas = [a.requires_grad_() for a in alphas_of(3)]

    def step(x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        return function(x * 2.0, *alphas, counts, row_weights=weights) + 1.0

    one_graph = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    both_passes = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for counts in ([3, 0, 4], [2, 2, 5]):
        x = torch.randn(9, 6, requires_grad=True)
        weights = torch.rand(9, 1, requires_grad=True)
        given = x, torch.tensor(counts), weights
        expected = step(*given)
        assert torch.equal(one_graph(*given), expected)
        inputs = x, weights, *alphas
        gradients = torch.autograd.grad(expected.sum(), inputs)
        again = torch.autograd.grad(both_passes(*given).sum(), inputs)
        assert all(map(torch.equal, gradients, again))
    assert len(counter.operators) == 1 and len(counter.operators[0]) == 1


@ON_BACKENDS
def test_compiles_with_a_list_and_the_default_backend() -> None:
    torch._dynamo.reset()
    alphas = [a.requires_grad_() for a in alphas_of(2)]
    x = torch.randn(8, 5, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return grouped.grouped_xielu(x, *alphas, [3, 2], rows_per_expert=[4, 4])

    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        y = f(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), (x, *alphas))))
    assert all(map(torch.equal, *results))


@ON_BACKENDS
@BOTH
def test_fake_tensors(name: str) -> None:
    x, _, weights, _ = inputs_of("uneven", 4, torch.bfloat16)
    alphas, counts = alphas_of(4), torch.tensor(CASES["uneven"][0])

    def step(x: Tensor, counts: Tensor, weights: Tensor, *alphas: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.requires_grad_() for t in (x, *alphas, weights)]
        y = getattr(grouped, f"grouped_{name}")(*inputs[:3], counts, row_weights=inputs[3])
        return torch.autograd.grad(y.sum(), inputs)

    given = x.detach(), counts, weights.float(), *alphas
    graph = make_fx(step, tracing_mode="fake")(*given)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum(f"megatron_xielu.grouped_{name}" in target for target in targets) == 2
    with torch.no_grad():
        traced = graph(*given)
    assert all(map(torch.equal, traced, step(*given)))
    meta = [t.to("meta") for t in (x.detach(), *alphas, counts, weights.float())]
    y = getattr(grouped, f"grouped_{name}")(*meta[:4], row_weights=meta[4])
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@ON_BACKENDS
@BOTH
def test_opcheck(name: str) -> None:
    forward = getattr(torch.ops.megatron_xielu, f"grouped_{name}").default
    backward = getattr(torch.ops.megatron_xielu, f"grouped_{name}_backward").default
    x, dy, weights, ranges = inputs_of("uneven", 6, torch.bfloat16)
    alphas = alphas_of(4)
    quick = ("test_schema", "test_faketensor")
    for given, tests in (
        (None, quick),
        (
            weights[:, None].float(),
            (*quick, "test_autograd_registration", "test_aot_dispatch_dynamic"),
        ),
    ):
        inputs = x.detach(), *alphas, 0.5, given, ranges
        torch.library.opcheck(backward, (dy, *inputs), test_utils=tests)
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *alphas, given)]
        inputs = *leaves[:3], 0.5, leaves[3], ranges
        torch.library.opcheck(forward, inputs, test_utils=tests)


@BOTH
def test_derivatives_of_every_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First ones by finite differences; the second, forward mode and `torch.func` by the oracle."""
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    torch.manual_seed(2)
    x = torch.randn(9, 3, dtype=torch.float64)
    x = torch.where(x.abs() < 0.01, x + 0.1, x)  # xIPReLU's curvature jumps at 0
    leaves = (x, *alphas_of(4, torch.float64), torch.rand(9, 1, dtype=torch.float64))
    inputs = tuple(t.requires_grad_() for t in leaves)

    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, weights: Tensor) -> Tensor:
        counts = {"tokens_per_expert": [2, 0, 4, 1], "rows_per_expert": [3, 0, 4, 1]}
        return getattr(grouped, f"grouped_{name}")(
            x, alpha_p, alpha_n, row_weights=weights, **counts
        )

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(lambda *i: function(*i, None), inputs[:3])
    expected = torch.autograd.grad(function(*inputs).sum(), inputs)
    found = torch.func.grad(lambda *i: function(*i).sum(), (0, 1, 2, 3))(*inputs)
    torch.testing.assert_close(found, expected)
    batch = torch.stack([inputs[0], 2 * inputs[0]])
    mapped = torch.func.vmap(function, (0, None, None, None))(batch, *inputs[1:])
    torch.testing.assert_close(mapped[1], function(batch[1], *inputs[1:]))


X, ALPHAS = torch.zeros(6, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, not NoneType"),
        ({"x": X[0]}, ValueError, r"x must have shape \(rows, ffn\), not \(4,\)"),
        ({"x": X.int()}, TypeError, "x must be float64, float32, bfloat16 or float16"),
        (
            {"alpha_p": ALPHAS[:1]},
            ValueError,
            r"alpha_p must have one .* 3 experts, in shape \(3,\)",
        ),
        ({"alpha_n": ALPHAS[:, None]}, ValueError, r"alpha_n must have .*, not \(3, 1\)"),
        ({"alpha_n": ALPHAS.bfloat16()}, TypeError, "alpha_n is torch.bfloat16: keep it in"),
        ({"beta": 0}, ValueError, "beta must be from"),
        (
            {"tokens_per_expert": 6},
            TypeError,
            "tokens_per_expert must be a list of ints or a tensor",
        ),
        ({"tokens_per_expert": []}, ValueError, "tokens_per_expert must have at least one expert"),
        (
            {"tokens_per_expert": [1, 2.0, 3]},
            TypeError,
            "tokens_per_expert must be ints, not float",
        ),
        (
            {"tokens_per_expert": [1, 2, True]},
            TypeError,
            "tokens_per_expert must be ints, not bool",
        ),
        (
            {"tokens_per_expert": ALPHAS},
            TypeError,
            "tokens_per_expert must be integers, not torch.fl",
        ),
        (
            {"tokens_per_expert": ALPHAS > 0},
            TypeError,
            "tokens_per_expert must be integers, not tor",
        ),
        (
            {"tokens_per_expert": ALPHAS.int()[None]},
            ValueError,
            r"tokens_per_expert must have shape \(experts,\), not \(1, 3\)",
        ),
        (
            {"tokens_per_expert": ALPHAS.int().to("meta")},
            ValueError,
            "tokens_per_expert is on meta and x on cpu: move it there, or to the CPU",
        ),
        (
            {"tokens_per_expert": [1, 2, 4]},
            ValueError,
            "tokens_per_expert is 7 in all, and x has 6 rows",
        ),
        (
            {"tokens_per_expert": torch.tensor([1, 2, 4])},
            ValueError,
            "tokens_per_expert is 7 in all, and x has 6 rows",
        ),
        (
            {"tokens_per_expert": [3, -1, 4]},
            ValueError,
            "tokens_per_expert must not be negative, and one is -1",
        ),
        (
            {"rows_per_expert": [2, 2, 3]},
            ValueError,
            "rows_per_expert is 7 in all, and x has 6 rows",
        ),
        (
            {"rows_per_expert": [1, 1, 2]},
            ValueError,
            "tokens_per_expert is 2 and rows_per_expert 1 of expert 1: its rows must hold its tok",
        ),
        ({"rows_per_expert": [3, 3]}, ValueError, "rows_per_expert has 2 experts, and tokens_per_"),
        ({"rows_per_expert": "1"}, TypeError, "rows_per_expert must be a list of ints or a tensor"),
        (
            {"row_weights": X[:, :2]},
            ValueError,
            r"row_weights must have one element for each of 6 rows, in shape \(6,\) or \(6, 1\),",
        ),
        ({"row_weights": X[:, 0].half()}, TypeError, "row_weights is torch.float16: keep it in"),
        ({"row_weights": X[:, 0].to("meta")}, ValueError, "row_weights is on meta and x on cpu"),
        ({"row_weights": [1.0] * 6}, TypeError, "row_weights must be a tensor, not list"),
    ],
)
@BOTH
def test_refusals(name: str, arguments: dict, error: type, message: str) -> None:
    given = {"x": X, "alpha_p": ALPHAS, "alpha_n": ALPHAS, "tokens_per_expert": [1, 2, 3]}
    with pytest.raises(error, match=message) as raised:
        getattr(grouped, f"grouped_{name}")(**(given | arguments))
    assert "\n" not in str(raised.value)
