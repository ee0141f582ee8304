"""Every bad argument of every function: the kind of error, what its message says, no harm done.

`BAD` is the table. A row is a bad value for an argument, the error, and pieces of its message: the
argument, what came, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import LAYOUTS
from support.judge import case
from support.variants import Variant, each_backend

SHAPE = (4, 10, 8, 20)


@dataclass(frozen=True)
class Bad:
    """A bad value and how it is answered."""

    label: str
    value: Callable[[], Any]
    error: type[Exception]
    pieces: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    """The functions that refuse it; all that take the argument, where empty."""


def bad(
    label: str, value: Any, error: type[Exception], *pieces: str, verbs: tuple[str, ...] = ()
) -> Bad:
    """A row; `value` is used as it is."""
    return Bad(label, lambda: value, error, pieces, verbs)


FORWARD = ("batch_norm", "normalize")
BACKWARD = ("batch_norm_backward", "normalize_backward")
SECOND = ("batch_norm_double_backward", "normalize_double_backward")
WRITING = (*FORWARD, *BACKWARD)
ARRAYS = {
    "x": (*WRITING, *SECOND, "moments", "gradient_sums"),
    "dy": (*BACKWARD, *SECOND, "gradient_sums"),
    "ddx": SECOND,
    "gamma": (*WRITING, *SECOND),
    "beta": FORWARD,
    "ddgamma": SECOND,
    "ddbeta": SECOND,
    "mean": ("normalize", *BACKWARD, *SECOND, "gradient_sums"),
    "var": ("normalize", *BACKWARD, *SECOND, "gradient_sums"),
    "residual": FORWARD,
    "y": (*BACKWARD, "gradient_sums"),
}
ELEMENTS = "float16, bfloat16, float32 or float64"
LIKE_X = ("x", "dy", "ddx", "residual", "y")
"""Arrays of x's shape; all others have a value a channel."""
EXACT = ("batch_norm_backward", "batch_norm_double_backward", "gradient_sums")
"""The functions that take statistics in float64 alone."""
BY_GIVEN = ("normalize", "normalize_backward", "normalize_double_backward")
OPTIONAL = ("gamma", "beta", "residual", "y", "ddx", "ddgamma", "ddbeta")


def not_an_array(name: str, known: str = ELEMENTS, verbs: tuple[str, ...] = ()) -> list[Bad]:
    """What no array argument may be, in verbs that take the types `known`."""
    shape = SHAPE if name in LIKE_X else (10,)
    rows = [
        bad("list", [[1.0]], TypeError, f"{name} is a list ([[1.0]])", "numpy.asarray"),
        bad("float", 1.5, TypeError, f"{name} is a float (1.5)", "numpy.ndarray", "numpy.asarray"),
        bad("str", "ones", TypeError, f"{name} is a str", known),
        bad("scalar", np.float32(1), TypeError, f"{name} is a float32", "numpy.asarray"),
        bad(
            "masked",
            np.ma.masked_array(np.ones(shape, np.float32)),
            TypeError,
            f"{name} is a numpy.ma.MaskedArray",
            "plain numpy.ndarray",
            ".filled(",
        ),
    ]
    remedies = {"complex64": f"{name}.real", "longdouble": ".astype(numpy.float64)"}
    usual = ".astype(numpy.float64)" if known == "float64" else ".astype(numpy.float32)"
    wrong = ("int64", "uint32", "bool", "object", "U3", "T", *remedies)
    for dtype in ("float16", "float32", *wrong) if known == "float64" else wrong:
        array = np.ones(shape).astype(dtype)
        remedy = remedies.get(dtype, usual)
        pieces = (f"{name} has dtype {array.dtype}", f"expected {known}", remedy)
        rows.append(bad(dtype, array, TypeError, *pieces))
    rows = [replace(row, verbs=verbs) for row in rows]
    if name not in OPTIONAL:
        lacking = verbs or ARRAYS[name]
        lacking = tuple(v for v in lacking if (name, v) != ("x", "normalize_backward"))
        rows.append(bad("None", None, TypeError, f"{name} is a NoneType", known, verbs=lacking))
    return rows


def not_like_x(name: str, advice: str) -> list[Bad]:
    """Arrays that are not of x's shape and dtype."""
    shape = f"{name} has shape (4, 8, 20, 10), expected (4, 10, 8, 20), the shape of x"
    short = f"{name} has shape (3,), expected (4, 10, 8, 20)"
    dtype = f"{name} has dtype float64, expected float32, the dtype of x"
    remedy = f"{name}.astype(numpy.float32)"
    return [
        bad("shape", np.ones((4, 8, 20, 10), np.float32), ValueError, shape, advice),
        bad("rank", np.ones(3, np.float32), ValueError, short),
        bad("dtype", np.ones(SHAPE), TypeError, dtype, remedy),
    ]


def not_of_the_channels(name: str) -> list[Bad]:
    """Vectors that do not fit x's 10 channels."""
    came = "x has 10 channels (axis 1 of shape (4, 10, 8, 20), layout 'NCHW')"
    return [
        bad(
            "channels of the other layout",
            np.ones(20),
            ValueError,
            f"{name} has shape (20,) but {came}; for channels-last data pass layout='NHWC'",
        ),
        bad("too few", np.ones(9), ValueError, f"{name} has shape (9,) but {came}", "(10,)"),
        bad("none", np.ones(0), ValueError, f"{name} has shape (0,) but {came}", "(10,)"),
        bad("one", np.ones(1), ValueError, f"{name} has shape (1,) but {came}", "(10,)"),
        bad("rank 0", np.ones(()), ValueError, f"{name} has shape () but {came}", "numpy.full(10,"),
        bad(
            "rank 4",
            np.ones((1, 10, 1, 1)),
            ValueError,
            f"{name} has shape (1, 10, 1, 1) but {came}; expected shape (10,)",
            f"pass {name}.reshape(-1)",
        ),
    ]


def outputs(name: str) -> list[Bad]:
    """Arrays that `out` or `dresidual` may not be; overlaps are in test_out.py."""
    frozen = np.ones(SHAPE, np.float32)
    frozen.flags.writeable = False
    make = "make it with numpy.empty((4, 10, 8, 20), numpy.float32)"
    plain = np.ones(SHAPE, np.float32)
    swapped = plain.astype(plain.dtype.newbyteorder("S"))
    return [
        bad("masked", np.ma.masked_array(plain), TypeError, f"{name} is a MaskedArray", make),
        bad(
            "float64",
            np.ones(SHAPE),
            TypeError,
            f"{name} has dtype float64, expected float32",
            make,
        ),
        bad(
            "swapped", swapped, TypeError, f"{name} has dtype >f4, expected float32 in native", make
        ),
        bad(
            "shape",
            np.ones((4, 8, 20, 10), np.float32),
            ValueError,
            f"{name} has shape (4, 8, 20, 10), expected (4, 10, 8, 20)",
            make,
        ),
        bad("flat", np.ones(6400, np.float32), ValueError, f"{name} has shape (6400,)", make),
        bad("read-only", frozen, ValueError, f"{name} is read-only, expected a writeable", make),
    ]


def sums() -> list[Bad]:
    """What is no (dgamma, dbeta, count) of a batch of which x, with 640 values a channel, is a
    part."""
    v, n = np.ones(10), 640
    three = "expected (dgamma, dbeta, count) as gradient_sums gives them"
    number = "expected a finite number, zero or more"
    rows = [
        bad("list", [v, v], TypeError, "sums is a list", three),
        bad("array", v, TypeError, "sums is an ndarray", three),
        bad("bool", True, TypeError, "sums is a bool (True)", three),
        bad("empty", (), TypeError, "sums is a tuple (())", three),
        bad("without a count", (v, v), TypeError, "sums is a tuple", three),
        bad("four", (v, v, n, v), TypeError, "sums is a tuple", three),
        bad("small count", (v, v, 639), ValueError, "sums[2] is 639", "at least the 640 of x"),
        bad("negative count", (v, v, -1), ValueError, "sums[2] is -1", number),
        bad("NaN count", (v, v, np.nan), ValueError, "sums[2] is nan", number),
        bad("infinite count", (v, v, np.inf), ValueError, "sums[2] is inf", number),
        bad("bool count", (v, v, True), TypeError, "sums[2] is a bool (True)", "pass an int"),
        bad("str count", (v, v, "640"), TypeError, "sums[2] is a str ('640')", "pass an int"),
        bad("no count", (v, v, None), TypeError, "sums[2] is a NoneType", "pass an int"),
    ]
    for name, place in (("sums[0]", lambda a: (a, v, n)), ("sums[1]", lambda a: (v, a, n))):
        came = f"{name} has shape (9,) but x has 10 channels"
        dtype = f"{name} has dtype float32, expected float64"
        rows += [
            bad(f"short {name}", place(v[:9]), ValueError, came, "expected shape (10,)"),
            bad(f"float32 {name}", place(v.astype("f4")), TypeError, dtype, "astype"),
            bad(f"list {name}", place([1.0]), TypeError, f"{name} is a list", "numpy.asarray"),
            bad(f"no {name}", place(None), TypeError, f"{name} is a NoneType"),
        ]
    return rows


BAD: dict[str, list[Bad]] = {
    "x": [
        *not_an_array("x"),
        bad(
            "rank 0", np.ones((), np.float32), ValueError, "x has rank 0 (shape ())", "rank 2", "x["
        ),
        bad("rank 1", np.ones(3), ValueError, "x has rank 1 (shape (3,))", "rank 2", "x[:, None]"),
        bad(
            "absent for dgamma",
            None,
            TypeError,
            "x is None, expected the array given to normalize",
            "params=False",
            verbs=("normalize_backward",),
        ),
    ],
    "dy": [
        *not_an_array("dy"),
        *not_like_x("dy", "pass the gradient"),
    ],
    "ddx": [*not_an_array("ddx"), *not_like_x("ddx", "pass the gradient with respect to the dx")],
    **{
        name: [*not_an_array(name), *not_of_the_channels(name)]
        for name in ("gamma", "beta", "ddgamma", "ddbeta")
    },
    "mean": [
        *not_an_array("mean", verbs=BY_GIVEN),
        *not_an_array("mean", "float64", verbs=EXACT),
        *not_of_the_channels("mean"),
    ],
    "var": [
        *not_an_array("var", verbs=BY_GIVEN),
        *not_an_array("var", "float64", verbs=EXACT),
        *not_of_the_channels("var"),
        *(
            bad(
                str(value),
                np.array([1.0] * 9 + [value]),
                ValueError,
                f"var[9] is {value}: a variance cannot be negative",
                "expected zero or more",
                "channel 9",
            )
            for value in (-1.0, -1e-300, -np.inf)
        ),
        bad(
            "NaN",
            np.array([1.0, np.nan] * 5),
            ValueError,
            "var[1] is nan: not a number",
            "expected zero or more, and no NaN",
            "channel 1",
            verbs=BY_GIVEN,
        ),
    ],
    "eps": [
        bad("negative", -1e-5, ValueError, "eps is -1e-05", "zero or more", "1e-5 is usual"),
        bad("NaN", float("nan"), ValueError, "eps is nan", "finite number, zero or more"),
        bad("infinite", float("inf"), ValueError, "eps is inf", "finite number, zero or more"),
        bad("str", "1e-5", TypeError, "eps is a str ('1e-5')", "expected a number", "pass a float"),
        bad("None", None, TypeError, "eps is a NoneType", "expected a number", "pass a float"),
        bad("bool", True, TypeError, "eps is a bool (True)", "expected a number", "pass a float"),
        bad("complex", 1j, TypeError, "eps is a complex (1j)", "expected a number", "pass a float"),
        bad("array", np.ones(1), TypeError, "eps is a", "ndarray", "expected a number"),
        bad("huge", 10**400, ValueError, "eps is ", "expected a finite number"),
    ],
    "layout": [
        bad("lower case", "nchw", ValueError, "layout is 'nchw'", "'NCHW'", "'NHWC'"),
        bad("other", "CNHW", ValueError, "layout is 'CNHW', expected", "axis 1", "channels last"),
        bad("empty", "", ValueError, "layout is '', expected", "'NCHW'"),
        bad("None", None, TypeError, "layout is None, expected", "'NCHW'"),
        bad("bytes", b"NCHW", TypeError, "layout is b'NCHW', expected", "'NCHW'"),
        bad("axis", 1, TypeError, "layout is 1, expected", "'NCHW'"),
        bad("unhashable", ["NCHW"], TypeError, "layout is ['NCHW'], expected", "'NCHW'"),
        bad("array", np.array("NCHW"), TypeError, "layout is array('NCHW'", "'NCHW'"),
        bad("arrays", np.array(["NCHW", "NHWC"]), TypeError, "layout is array([", "'NCHW'"),
    ],
    "params": [
        bad("int", 1, TypeError, "params is an int (1)", "expected True or False", "pass one"),
        bad("None", None, TypeError, "params is a NoneType", "expected True or False"),
        bad("str", "no", TypeError, "params is a str ('no')", "expected True or False"),
        bad("list", [], TypeError, "params is a list ([])", "expected True or False"),
    ],
    "activation": [
        bad("name", "gelu", ValueError, "activation is 'gelu', expected None, 'relu', 'relu6'"),
        bad("type", 1, TypeError, "activation is 1, expected None", "('leaky_relu', slope)"),
        bad("list", ["leaky_relu", 0.1], TypeError, "activation is ['leaky_relu', 0.1], expected"),
        bad("without a slope", "leaky_relu", ValueError, "activation is 'leaky_relu', expected"),
        *(
            bad(str(slope), ("leaky_relu", slope), ValueError, "0 < slope < 1", "afterwards")
            for slope in (0, 1, -0.5, 1.5, float("nan"), "0.1", True, None)
        ),
        *(
            bad(
                f"{value} differentiated twice",
                value,
                TypeError if value == 1 else ValueError,
                f"activation is {value!r}, expected None",
                "no second derivative at its kinks",
                "multiply dy by its slope",
                verbs=SECOND,
            )
            for value in ("relu", "relu6", ("leaky_relu", 0.1), "gelu", 1)
        ),
    ],
    "residual": [*not_an_array("residual"), *not_like_x("residual", "numpy.broadcast_to")],
    "y": [
        *not_an_array("y"),
        *not_like_x("y", "pass what the forward returned"),
        bad("None", None, TypeError, "y is None, expected the forward's y", "'relu'", "pass y=y"),
    ],
    "dresidual": [
        *outputs("dresidual"),
        bad("int", 1, TypeError, "dresidual is an int (1)", "expected True or False"),
        bad("None", None, TypeError, "dresidual is a NoneType", "expected True or False"),
    ],
    "sums": sums(),
    "out": [
        *outputs("out"),
        bad("list", [1.0], TypeError, "out is a list ([1.0])", "expected a numpy.ndarray"),
    ],
}

TAKEN_BY = ARRAYS | {
    "eps": (*WRITING, *SECOND, "gradient_sums"),
    "layout": (*WRITING, *SECOND, "moments", "gradient_sums"),
    "params": BACKWARD,
    "activation": (*WRITING, "gradient_sums"),
    "sums": ("batch_norm_backward",),
    "dresidual": BACKWARD,
    "out": WRITING,
}


def arguments(verb: str) -> dict[str, Any]:
    """Good arguments, all of them given, with an `out` that shows whether it was written."""
    rng = np.random.default_rng(0)
    names = LIKE_X
    arrays = dict(zip(names, rng.normal(size=(5, *SHAPE)).astype(np.float32), strict=True))
    names = ("gamma", "beta", "mean", "ddgamma", "ddbeta")
    vectors = dict(zip(names, rng.normal(size=(5, 10)), strict=True))
    options = {"eps": 1e-5, "layout": "NCHW", "params": True, "activation": "relu"}
    written = {name: np.full_like(arrays["x"], 77) for name in ("out", "dresidual")}
    every = {**arrays, **vectors, "var": np.ones(10), **options, **written}
    return {name: value for name, value in every.items() if verb in TAKEN_BY[name]}


def refuse(verb: str, changed: dict[str, Any], error: type[Exception]) -> str:
    """Call `verb` with some arguments changed; gives the message of the error it must raise."""
    given = arguments(verb) | changed
    before = {
        k: v.tobytes() for k, v in given.items() if isinstance(v, np.ndarray) and v.dtype != object
    }
    with pytest.raises(error) as caught:
        getattr(fastbn, verb)(**given)
    assert type(caught.value) is error
    for name, value in before.items():
        assert given[name].tobytes() == value, f"{name} was written"
    return str(caught.value)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("argument", BAD)
def test_bad_argument(variant: Variant, argument: str) -> None:
    """The error is of the right kind, its message says all four things, nothing was written."""
    for row in BAD[argument]:
        for verb in row.verbs or TAKEN_BY[argument]:
            with case(verb, row.label):
                message = refuse(verb, {argument: row.value()}, row.error)
                assert [piece for piece in row.pieces if piece not in message] == []
                assert message.startswith(argument)


@pytest.mark.no_kernel
@pytest.mark.parametrize("verb", [*WRITING, *SECOND])
def test_good_arguments_are_good(verb: str) -> None:
    """The arguments that every case starts from are accepted: a case fails for its own reason."""
    with fastbn.use_backend("numpy"):
        given = arguments(verb)
        getattr(fastbn, verb)(**given)
        assert not (given.get("out", np.zeros(1)) == 77).any()


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("verb", SECOND)
def test_nothing_to_differentiate(variant: Variant, verb: str) -> None:
    """Without any of the three gradients there is no loss."""
    message = refuse(verb, {"ddx": None, "ddgamma": None, "ddbeta": None}, TypeError)
    assert message.startswith("ddx, ddgamma, ddbeta are all None, expected an array in place of")


@each_backend
@pytest.mark.no_kernel
def test_channels_first_data_called_channels_last(variant: Variant) -> None:
    """The hint at the other layout works in both directions."""
    with pytest.raises(
        ValueError, match=r"axis 3 of shape .* for channels-first data pass layout='NCHW'"
    ):
        fastbn.batch_norm(np.ones(SHAPE, np.float32), np.ones(10), layout="NHWC")


@each_backend
@pytest.mark.no_kernel
def test_dy_alone_is_checked_as_x_is(variant: Variant) -> None:
    """With x absent, dy's own type and rank are checked, and the vectors against dy."""
    absent = {"x": None, "params": False, "out": None, "dresidual": False}
    message = refuse("normalize_backward", absent | {"dy": np.ones(3)}, ValueError)
    assert message.startswith("dy has rank 1")
    message = refuse("normalize_backward", absent | {"dy": [1.0]}, TypeError)
    assert message.startswith("dy is a list")
    message = refuse("normalize_backward", absent | {"gamma": np.ones(20)}, ValueError)
    assert message.startswith("gamma has shape (20,) but dy has 10 channels")


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_is_not_guessed(variant: Variant, layout: str) -> None:
    """A vector is not taken for a batch in any layout."""
    with pytest.raises(ValueError, match="x has rank 1"):
        fastbn.moments(np.ones(3), layout=layout)


@each_backend
def test_unusual_good_arguments(variant: Variant) -> None:
    """NumPy's scalars, fractions and whole numbers are numbers; numpy.bool is a bool."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    expected = fastbn.batch_norm(x, eps=0.5)
    for eps in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        np.testing.assert_array_equal(fastbn.batch_norm(x, eps=eps).y, expected.y)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        fastbn.batch_norm(x, eps=np.int64(1)).y,  # type: ignore[arg-type]
        fastbn.batch_norm(x, eps=1.0).y,
    )
    for params in (np.True_, np.False_):
        backward: Any = fastbn.batch_norm_backward
        got = backward(x, x, expected.mean, expected.var, params=params)
        assert (got.dgamma is None) == (not params)


@pytest.mark.parametrize("set_or_use", ["set_num_threads", "use_num_threads"])
@pytest.mark.parametrize(
    ("value", "error", "pieces"),
    [
        (0, ValueError, ("n is 0", "from 1 to", "pass 1 for serial work")),
        (-2, ValueError, ("n is -2", "from 1 to")),
        (10**9, ValueError, ("n is 1000000000", "from 1 to")),
        (2.0, TypeError, ("n is a float (2.0)", "whole number", "pass an int")),
        ("2", TypeError, ("n is a str ('2')", "whole number", "pass an int")),
        (None, TypeError, ("n is a NoneType", "whole number", "pass an int")),
        (True, TypeError, ("n is a bool (True)", "whole number", "pass an int")),
    ],
)
def test_bad_number_of_threads(
    set_or_use: str, value: Any, error: type[Exception], pieces: tuple[str, ...]
) -> None:
    """Zero, negative, huge and non-integer numbers of threads are refused and change nothing."""
    before = fastbn.get_num_threads()
    with pytest.raises(error) as caught:
        call(set_or_use, value)
    for piece in pieces:
        assert piece in str(caught.value)
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("set_or_use", ["set_backend", "use_backend"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("cuda", ValueError),
        ("NumPy", ValueError),
        ("", ValueError),
        (None, TypeError),
        ([], TypeError),
    ],
)
def test_unknown_backend(set_or_use: str, value: Any, error: type[Exception]) -> None:
    """A backend that does not exist is refused; the message lists those that do."""
    before = fastbn.get_backend()
    with pytest.raises(error) as caught:
        call(set_or_use, value)
    message = str(caught.value)
    assert message.startswith(f"backend is {value!r}, expected one of")
    for piece in ("'auto'", "'cython'", "'numba'", "'numpy'", "usable here: "):
        assert piece in message
    assert fastbn.get_backend() == before


def call(set_or_use: str, value: Any) -> None:
    """Call set_*(value), or enter use_*(value)."""
    if set_or_use.startswith("set"):
        getattr(fastbn, set_or_use)(value)
    else:
        with getattr(fastbn, set_or_use)(value):
            pass
