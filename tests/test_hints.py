"""Messages say what to do. What they say in code works, and what they show is short.

A row of `ROWS` is a call, good arguments, and a bad one. The hints of its error are carried out, as
often as another error follows, until the call succeeds.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest

import fastbn
import fastbn.dask
from fastbn import checks
from fastbn.errors import MOST, shown
from support.tensors import Tensor

ANY = r"[\w\0]"
"""Of a name; a zero stands for what a message fills in."""
CALL = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
EXPRESSION = rf"{ANY}+(?:\.{ANY}+|{CALL}|\[[^]]*\])+"
KEYWORD = rf"{ANY}+=(?:'\w+'|{ANY}+)"
HINT = re.compile(
    rf"(?:\bpass|\bwith|\bor|,) ((?:{KEYWORD}|{EXPRESSION}|\[\w+\])(?: and {KEYWORD})*)"
)
"""What follows such a word, and is code."""


def hints(message: str) -> list[str]:
    """The code in a message, behind what came and what was expected."""
    return HINT.findall(re.split("expected|; ", message, maxsplit=1)[-1])


def mended(given: dict[str, Any], name: str, code: str) -> dict[str, Any]:
    """The arguments after a hint about one of them was followed, in a namespace of the caller's."""
    own = {"value": 1.0, "y": X, "batch": X, "layer": given.get("layers")}
    names = {"numpy": np, "fastbn": fastbn, "ml_dtypes": ml_dtypes, "dask": dask} | own
    names |= {k: v for k, v in given.items() if v is not None}
    if re.fullmatch(rf"{KEYWORD}(?: and {KEYWORD})*", code):
        keywords: dict[str, Any] = eval(f"dict({code.replace(' and ', ', ')})", names)
        return given | keywords
    value, (argument, _, index) = eval(code, names), name.partition("[")
    if index:
        whole = given[argument]
        parts: Any = dict(whole) if isinstance(whole, dict) else list(whole)
        parts[ast.literal_eval(index[:-1])] = value
        value = parts
    return given | {argument: value}


SHAPE = (4, 6, 5)
X, DY = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
X.flags.writeable = False
V, T, W = np.linspace(1, 2, 6), np.ones((4, 6)), np.ones((4, 1, 5), bool)
LAZY = da.from_array(X)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Odd(np.ndarray[Any, Any]):
    """An array whose own methods are of no use, as numpy.matrix's `reshape`."""

    def reshape(self, *shape: Any, **options: Any) -> Any:
        return self

    def astype(self, *given: Any, **options: Any) -> Any:
        return self


def odd(a: Any) -> Any:
    return a.view(Odd)


def saved(a: Any) -> Any:
    """As numpy.load gives what numpy.save was given in bfloat16."""
    return a.astype(ml_dtypes.bfloat16).view("V2")


def swapped(a: Any) -> Any:
    """In bfloat16 of the other byte order."""
    return saved(a).view(np.uint16).byteswap().view(BFLOAT16.newbyteorder())


def matrix(a: Any) -> Any:
    return np.ndarray.view(a, np.matrix)


def layer(x: Any = X, track: bool = True, **options: Any) -> None:
    """A call of a layer that was made so."""
    options.setdefault("track_running_stats", track)
    fastbn.BatchNorm(6, **options)(x)


def merged(other: Any, x: Any) -> None:
    fastbn.Moments.of(x).merge(other)


def averaged(batches: Any) -> None:
    fastbn.population_statistics(batches)


def renewed(layers: Any, batches: Any, **options: Any) -> None:
    """By a network that is made of the layers."""

    def network(x: Any) -> None:
        for one in layers:
            one(x)

    fastbn.reestimate(layers, network, batches, **options)


def served(**options: Any) -> None:
    fastbn.BatchNorm(6, **options).to_frozen()


def resumed(**options: Any) -> None:
    """A layer that infinity has been in."""
    bn: Any = fastbn.BatchNorm(6, **options)
    bn.running_var[2] = np.inf
    bn(X)


def loaded(state: Any, **options: Any) -> None:
    fastbn.LayerNorm(6, **options).load_state_dict({k: v for k, v in state.items() if not options})


BATCH = {"x": X}
BACKWARD = {"dy": DY, "x": X, "mean": V, "var": V}
FOLD = {"weight": np.ones((6, 3)), "bias": V, "mean": V, "var": V}
TURNED = np.ones(SHAPE, np.float32)
SAME = np.lib.stride_tricks.as_strided(np.ones(5, np.float32), SHAPE, (0, 0, 4))
TWO = [fastbn.BatchNorm(6), fastbn.BatchNorm(6)]
NOT_TRACKED = {"track_running_stats": False}

Row = tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]
ROWS: list[Row] = [
    # What is no array, or of another type or rank
    *(
        (fastbn.batch_norm, {}, {"x": x})
        for x in (
            *(X.tolist(), ((1.0, 2.0),), 1.5, np.float32(1.5), np.array(1.5), odd(np.array(1.5))),
            *(np.ones(3), odd(np.ones(3)), np.ones(SHAPE, int), odd(np.ones(SHAPE, int))),
            *(X + 0j, odd(X + 0j), X.astype(np.longdouble), X.astype("U9"), X.astype(object)),
            *(np.ma.masked_array(X), saved(X), odd(saved(X)), matrix(np.ones((2, 3), int))),
            X.astype(BFLOAT16).astype(BFLOAT16.newbyteorder()),
            *(Tensor(X, requires_grad=True), Tensor(X, device=2)),
        )
    ),
    (fastbn.ColumnMoments.of, {}, {"x": np.ones((2, 3, 4))}),
    (
        fastbn.normalize,
        {"mean": V, "var": V},
        {"x": np.ones((4, 6), np.uint8), "dtype": np.float64},
    ),
    # Parameters and statistics
    *(
        (fastbn.batch_norm, BATCH, {"gamma": gamma})
        for gamma in (
            *(V.tolist(), 2.0, np.array(2.0), odd(np.array(2.0)), V[None, :, None], odd(V[None])),
            *(matrix(V[None]), np.arange(6), saved(V), np.ma.masked_array(V), np.ones(5)),
        )
    ),
    (fastbn.batch_norm, BATCH | {"layout": "NHWC"}, {"gamma": V}),
    (fastbn.layer_norm, {"x": X}, {"skip": X}),
    (fastbn.dask.normalize, {"x": LAZY, "mean": V, "var": V}, {"mean": da.from_array(V)}),
    (fastbn.dask.moments, {}, {"x": LAZY[LAZY[:, 0, 0] < 9]}),
    (fastbn.dask.moments, {}, {"x": X}),
    (fastbn.group_norm, BATCH | {"groups": 2}, {"beta": np.array(1)}),
    *(
        (verb, BACKWARD, {"mean": mean})
        for verb in (fastbn.batch_norm_backward, fastbn.gradient_sums)
        for mean in (
            V.astype("f4"),
            odd(V.astype("f2")),
            np.arange(6),
            V.tolist(),
            saved(V),
            V + 0j,
        )
    ),
    (fastbn.instance_norm_backward, BACKWARD | {"mean": T, "var": T}, {"var": T.astype("f4")}),
    *((fastbn.FrozenBatchNorm, {"var": V}, {"mean": mean}) for mean in (V[None], odd(V[None]))),
    (fastbn.FrozenBatchNorm, {"mean": V, "var": V}, {"beta": np.array(2)}),
    (fastbn.Moments.of(X).to_sums, {}, {"about": V[:, None]}),
    *(
        (fastbn.fold_into_conv, FOLD, {"weight": weight})
        for weight in (np.ones(6), odd(np.ones(6)), saved(np.ones((6, 3))), matrix(T.T.astype(int)))
    ),
    (fastbn.fold_into_conv, {"mean": V[:1], "var": V[:1], "bias": None}, {"weight": np.array(2.0)}),
    *(
        (fastbn.batch_norm_backward, BACKWARD, {"sums": sums})
        for sums in ((V.tolist(), V, 99), [V, V.astype("f4"), 99], (V[None], V, 99))
    ),
    # Arrays like x, and what counts
    (fastbn.batch_norm_backward, BACKWARD, {"dy": odd(DY.astype(float))}),
    (fastbn.batch_norm_backward, BACKWARD | {"x": X.astype(BFLOAT16)}, {"dy": DY}),
    (fastbn.batch_norm, BATCH, {"residual": X[:1, :, :1]}),
    (fastbn.moments, BATCH, {"weights": [1.0, 0.0, 2.0, 1.0]}),
    (fastbn.moments, BATCH, {"weights": saved(np.ones(4))}),
    *(
        (fastbn.moments, BATCH, {"where": where})
        for where in (
            *(W.tolist(), W.astype(int), odd(W.astype(int)), np.ma.masked_array(W), W[:, 0]),
            *(odd(W[:, 0]), W[:, 0].tolist(), 1),
        )
    ),
    # Where results go
    *(
        (fastbn.batch_norm, BATCH, {"out": out})
        for out in (
            *([1.0], np.ma.masked_array(X), X.astype(float), np.ones(120, np.float32), X, SAME),
        )
    ),
    (fastbn.batch_norm, {"x": TURNED}, {"out": TURNED[::-1]}),
    (fastbn.batch_norm, BATCH | {"gamma": TURNED.reshape(-1)[:6]}, {"out": TURNED}),
    (fastbn.batch_norm, {"x": X.astype(BFLOAT16)}, {"out": X.copy()}),
    (fastbn.batch_norm_backward, BACKWARD, {"dresidual": X[:1].copy()}),
    # Options
    (fastbn.batch_norm_backward, BACKWARD | {"activation": "relu"}, {"y": None}),
    (fastbn.normalize_backward, BACKWARD, {"x": None}),
    (layer, {}, {"momentum": [0.1]}),
    (layer, {}, {"renormalization": True}),
    (layer, {"x": X[:1, :, 0]}, {}),
    (layer, {"x": X[:1, :, 0]} | NOT_TRACKED, {}),
    (layer, {"x": X * np.nan}, {"nonfinite": "raise"}),
    (layer, {"x": X.astype(float) * 1e30}, {"nonfinite": "raise"}),
    (resumed, {}, {"nonfinite": "skip"}),
    (layer, {}, {"layout": "NHWC"}),
    (served, {}, NOT_TRACKED),
    (merged, BATCH, {"other": (1, V, V)}),
    (averaged, {}, {"batches": 3}),
    (renewed, {"batches": [X]}, {"layers": TWO[0]}),
    (renewed, {"layers": TWO}, {"batches": iter([X])}),
    (loaded, {}, {"state": {"weight": T, "bias": T}}),
    *(
        (loaded, {}, {"state": {"weight": V, "bias": bias}})
        for bias in (saved(V), saved(V).view(np.int16), swapped(V), np.ma.masked_array(V))
    ),
]
MESSAGES: list[str] = []
"""Those that were seen."""
TRIED: set[int] = set()
"""The rows that were; an iterator in one serves once."""


def follow(call: Callable[..., Any], given: dict[str, Any], depth: int = 4) -> None:
    """Call, and carry out every hint of the error, until nothing is left to repair."""
    try:
        call(**given)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        return
    MESSAGES.append(message)
    assert depth, message
    assert hints(message), f"no code in: {message}"
    for code in hints(message):
        follow(call, mended(given, message.split()[0], code), depth - 1)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_code_in_messages_works(row: int) -> None:
    """The bad argument is refused, and what the message says instead is accepted."""
    if row in TRIED:  # by the test below, in this process; a row's iterator serves once
        return
    call, good, bad = ROWS[row]
    TRIED.add(row)
    before = len(MESSAGES)
    with fastbn.use_backend("numpy"):
        follow(call, good | bad)
    assert len(MESSAGES) > before, "nothing was refused"


def test_every_piece_of_code_is_tried() -> None:
    """Each hint in `fastbn.checks` is in a message of the rows, but for those about communicators,
    which MPI or torch.distributed make."""
    for row in range(len(ROWS)):
        if row not in TRIED:  # here; others run in other processes
            test_code_in_messages_works(row)
    files = sorted(Path(checks.__file__).parent.glob("*.py"))
    sources = (path.read_text() for path in files if path.stem != "distributed")
    codes = {code for s in sources for some in texts(ast.parse(s)) for code in hints(some)}
    assert len(codes) > 20
    for code in sorted(codes):
        pattern = ".+".join(map(re.escape, code.split("\0")))
        assert any(re.search(pattern, message) for message in MESSAGES), code


def texts(node: ast.AST) -> Iterator[str]:
    """The strings of a source, with "\0" for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        yield "".join(map(str, parts))
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


class Loud:
    """Whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Long(list[Any]):
    """A list of somebody's own."""

    def __repr__(self) -> str:
        return "x" * 10**7


HUGE: list[Any] = [
    [[1.0] * 1000] * 1000,
    tuple(range(10**6)),
    set(range(10**5)),
    {i: i for i in range(10**5)},
    "a" * 10**7,
    b"a" * 10**7,
    Loud(),
    [Loud()],
    Long(),
    np.full((1, 3), Loud()),
    np.array(["a" * 1000]),
    np.ones(10**6),
    type("T" * 1000, (), {}),
    type("T" * 1000, (), {})(),
]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__[:9])
def test_messages_are_short(value: Any) -> None:
    """Whatever came, in whatever place: a moment, and some hundred characters."""
    calls: list[Callable[[Any], Any]] = [
        lambda v: fastbn.batch_norm(v),
        lambda v: fastbn.batch_norm(X, eps=v),
        lambda v: fastbn.batch_norm(X, layout=v),
        lambda v: fastbn.batch_norm(X, activation=v),
        lambda v: fastbn.batch_norm(X, activation=("leaky_relu", v)),
        lambda v: fastbn.batch_norm(X, out=v),
        lambda v: fastbn.batch_norm(X, where=v),
        lambda v: fastbn.batch_norm(X, virtual_batch=v),
        lambda v: fastbn.batch_norm_backward(DY, X, V, V, sums=v),
        lambda v: fastbn.group_norm(X, v),
        lambda v: fastbn.population_statistics([X], method=v),
        lambda v: fastbn.BatchNorm(6, dtype=v),
        lambda v: fastbn.BatchNorm.like(v, 6),
        lambda v: fastbn.BatchNorm(6, momentum=v, decay=v),
        lambda v: fastbn.BatchNorm(6, domains=v),
        lambda v: fastbn.BatchNorm(6, domains=[v, v]),
        lambda v: fastbn.BatchNorm(6)(X, domain=v),
        lambda v: fastbn.BatchNorm(6, domains=("a",))(X, domain=v),
        lambda v: fastbn.BatchNorm(6).backward(X, v),
        lambda v: fastbn.Moments(v, V, V),
        lambda v: fastbn.set_backend(v),
        lambda v: fastbn.set_num_threads(v),
    ]
    for i, call in enumerate(calls):
        assert_short(i, lambda call=call: call(value))  # type: ignore[misc]


@pytest.mark.parametrize("value", [10**70, 10**5000, -(10**5000)], ids=["long", "huge", "negative"])
def test_whole_numbers_are_short(value: int) -> None:
    """Also where Python refuses to write them."""
    calls: list[Callable[[], Any]] = [
        lambda: fastbn.group_norm(X, value),
        lambda: fastbn.fold_into_conv(T, None, np.ones(4), np.ones(4), groups=value),
        lambda: fastbn.set_num_threads(value),
        lambda: fastbn.Moments(-abs(value), V, V),
        lambda: fastbn.batch_norm(X, virtual_batch=-abs(value)),
        lambda: fastbn.BatchNorm(-abs(value)),
        lambda: fastbn.Renormalization(start=-abs(value)),
        lambda: fastbn.Renormalization(r_max=-abs(value)),
        lambda: fastbn.Renormalization(start=abs(value)),
        lambda: setattr(fastbn.BatchNorm(6), "num_batches_tracked", value),
        lambda: fastbn.BatchNorm(6, momentum=value),
    ]
    for i, call in enumerate(calls):
        assert_short(i, call)


def assert_short(i: int, call: Callable[[], Any]) -> None:
    """The call is refused at once, in few words."""
    start = time.thread_time()
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert time.thread_time() - start < 0.05, i
    assert len(str(caught.value)) < 400, i
    assert ", expected " in str(caught.value), i


def test_how_values_are_shown() -> None:
    """The beginning of what is long; the type of what says nothing."""
    for value, expected in (
        ([1, 2, 3, 4], "[1, 2, 3, ...]"),
        ([[[[[[1]]]]]], "[[[[<list>]]]]"),
        ((1,), "(1,)"),
        ({"a": [1]}, "{'a': [1]}"),
        (None, "None"),
        ("NCHW", "'NCHW'"),
        (np.float32(1), "np.float32(1.0)"),
        (np.ones(2), "array([1., 1.])"),
        (np.ones((2, 3)), "<ndarray of shape (2, 3) and dtype float64>"),
        (Loud(), "<Loud>"),
        (10**5000, "<int>"),
        ("a" * 100, "'" + "a" * (MOST - 4) + "..."),
    ):
        assert shown(value) == expected
