"""`BatchNorm` with domains: each set of running statistics is that of a layer of its own, under one
gamma and beta."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, Array
from support.bits import assert_same_bits
from support.layers import CHANNELS, batch, fails, made, refused
from support.variants import each_backend

SHAPE = (6, CHANNELS, 3)
DOMAINS = ("day", "night")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
OPEN = fastbn.Renormalization(start=1, r_end=3, d_end=2)


def divided(**options: Any) -> Any:
    """A layer with domains whose arrays are neither 0 nor 1."""
    return made(domains=DOMAINS, **options)


def alone(bn: Any, domain: str, **options: Any) -> Any:
    """A layer without domains, with the state that this one has for a domain."""
    state = bn.state_dict()
    own = {name: state[name] for name in ("weight", "bias")}
    own |= {name: state[f"{name}.{domain}"] for name in RUNNING}
    like = fastbn.BatchNorm(CHANNELS, **options).train(bn.training)
    like.load_state_dict(own)
    return like


def of(bn: Any, domain: str) -> dict[str, Array]:
    """A domain's running statistics, by the names of a layer that has no others."""
    return dict(zip(RUNNING, bn.running(domain), strict=True))


def running(bn: Any) -> dict[str, Array]:
    return {name: getattr(bn, name) for name in RUNNING}


# ---- Calls ----

WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "average": {"momentum": None},
    "decay": {"decay": 0.75, "unbiased": False},
    "virtual batches": {"virtual_batch": 4},
    "renormalization": {"renormalization": OPEN},
    "policies": {"one_value": "running", "nonfinite": "skip"},
}


@each_backend
@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_each_domain_is_a_layer_of_its_own(way: str, own: Any) -> None:
    """In training, in whichever order the domains come, and in evaluation; y, dx, gradients and
    what runs have its bits."""
    options = WAYS[way] | {"dtype": own, "activation": "relu"}
    bn = divided(**options)
    for i, domain in enumerate(DOMAINS):
        bn.running(domain).num_batches_tracked[...] = i
    layers = {domain: alone(bn, domain, **options) for domain in DOMAINS}
    x, dy, z = batch(SHAPE)
    for i, domain in enumerate(("day", "night", "night", "day", "night")):
        given, like = np.float32(i + 1) * x, layers[domain]
        expected = {"y": like(given, residual=z), "dx": like.backward(dy), "dgamma": like.dgamma}
        y = bn(given, residual=z, domain=domain)
        assert_same_bits({"y": y, "dx": bn.backward(dy), "dgamma": bn.dgamma}, expected)
        for name in DOMAINS:
            assert_same_bits(of(bn, name), running(layers[name]))
    before = bn.state_dict()
    for each in ("evaluation", "frozen statistics"):
        bn.train(each != "evaluation").frozen_statistics = each != "evaluation"
        for domain, like in layers.items():
            like.eval()
            y, saved = bn.forward(x, domain=domain)
            assert_same_bits({"y": y}, {"y": like(x)})
            assert_same_bits({"dx": bn.backward(dy, saved)}, {"dx": like.backward(dy)})
            assert_same_bits({"y": bn.to_frozen(domain=domain)(x)}, {"y": y})
    assert_same_bits(bn.state_dict(), before)


def test_domains_have_one_gamma() -> None:
    """Their gradients add up in its array, of forwards that went before either."""
    (x, dy, _), bn = batch(SHAPE), divided()
    like = {domain: alone(bn, domain) for domain in DOMAINS}
    left = {domain: bn.forward(x, domain=domain)[1] for domain in DOMAINS}
    expected = np.zeros(CHANNELS, np.float32)
    for domain, saved in left.items():
        like[domain](x)
        like[domain].backward(dy)
        expected += like[domain].dgamma
        bn.backward(dy, saved, accumulate=True)
    assert_same_bits({"dgamma": bn.dgamma}, {"dgamma": expected})


def test_without_update() -> None:
    """No domain's statistics change."""
    (x, _, _), bn = batch(SHAPE), divided(renormalization=OPEN)
    before, like = bn.state_dict(), alone(bn, "night", renormalization=OPEN)
    assert_same_bits({"y": bn(x, domain="night", update=False)}, {"y": like(x)})
    assert_same_bits(bn.state_dict(), before)


def test_an_untrained_domain() -> None:
    """Evaluation in it is that of an untrained layer."""
    (x, _, _), bn = batch(SHAPE), fastbn.BatchNorm(CHANNELS, domains=DOMAINS)
    bn(x, domain="day")
    y = bn.eval()(x, domain="night")
    assert_same_bits({"y": y}, {"y": fastbn.BatchNorm(CHANNELS).eval()(x)})
    assert bn.running("night").num_batches_tracked == 0


def test_a_momentum_set_later() -> None:
    """It is that of all domains."""
    (x, _, _), bn = batch(SHAPE), divided()
    bn.momentum = 1.0
    for domain in DOMAINS:
        bn(x, domain=domain)
        np.testing.assert_allclose(bn.running(domain).mean, x.mean((0, 2)), rtol=1e-6)
    bn.decay = 1.0
    before = bn.running("day").mean.copy()
    bn(2 * x, domain="day")
    np.testing.assert_array_equal(bn.running("day").mean, before)


# ---- Arrays, states, copies ----


def test_running_statistics_are_read_and_written_by_domain() -> None:
    """They are the layer's own arrays; the attributes of other layers say where they are."""
    (x, _, _), bn = batch(SHAPE), divided()
    mean, var, batches = bn.running("day")
    other = of(copy.deepcopy(bn), "night")
    mean[:], var[:], batches[...] = x.mean((0, 2)), x.var((0, 2)), 41
    expected = fastbn.normalize(x, mean, var, bn.gamma, bn.beta)
    assert_same_bits({"y": bn.eval()(x, domain="day")}, {"y": expected})
    bn.train()(x, domain="day")
    assert (batches == 42, bn.running("day").mean is mean) == (True, True)
    assert_same_bits(of(bn, "night"), other)
    assert bn.domains == DOMAINS
    for name in RUNNING:
        words = f"{name} is an attribute of layers without domains, ... layer.running('day'), whose"
        assert not hasattr(bn, name)
        with refused(bn, AttributeError, words):
            getattr(bn, name)
        with refused(bn, AttributeError, words):
            setattr(bn, name, None)
    with pytest.raises(AttributeError):
        bn.domains = ("day",)


def test_a_state() -> None:
    """Each array's name ends with its domain's; it goes from one such layer to another."""
    bn, fresh = divided(), fastbn.BatchNorm(CHANNELS, domains=DOMAINS)
    state = bn.state_dict()
    of_domains = [f"{name}.{domain}" for domain in DOMAINS for name in RUNNING]
    assert list(state) == ["weight", "bias", *of_domains]
    held = [fresh.running(domain).mean for domain in DOMAINS]
    fresh.load_state_dict(dict(reversed(state.items())))
    assert_same_bits(fresh.state_dict(), state)
    assert all(fresh.running(d).mean is a for d, a in zip(DOMAINS, held, strict=True))
    other = fastbn.BatchNorm(CHANNELS, domains=("night", "day"))
    other.load_state_dict(state)
    assert_same_bits(of(other, "day"), of(bn, "day"))
    del state["num_batches_tracked.night"]
    fresh.load_state_dict(state)
    assert [fresh.running(domain).num_batches_tracked for domain in DOMAINS] == [3, 0]


def test_names_of_any_kind() -> None:
    """With dots, or as another type's words."""
    names = ("a.b", "running_mean", np.str_("c"), "Ä 1")
    bn = fastbn.BatchNorm(CHANNELS, domains=list(names))
    assert bn.domains == names
    assert all(type(name) is str for name in bn.domains)
    x, _, _ = batch(SHAPE)
    for i, name in enumerate(names):
        bn.running(name).mean[:] = i
        bn(x, domain=name, update=False)
    other = fastbn.BatchNorm(CHANNELS, domains=names)
    other.load_state_dict(bn.state_dict())
    assert [other.running(name).mean[0] for name in names] == [0, 1, 2, 3]


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    """They have arrays of their own, of all domains."""
    (x, _, _), bn = batch(SHAPE), divided(momentum=None)
    other = COPIES[how](bn)
    assert_same_bits(other.state_dict(), bn.state_dict())
    before = bn.state_dict()
    other(x, domain="night")
    assert_same_bits(bn.state_dict(), before)
    assert_same_bits(of(other, "day"), of(bn, "day"))
    assert (other.running("night").mean != bn.running("night").mean).any()


def test_repr_and_like() -> None:
    """They make such a layer."""
    bn = fastbn.BatchNorm.like("keras", CHANNELS, domains=["day", "night"])
    words = "BatchNorm(5, eps=0.001, decay=0.99, unbiased=False, domains=('day', 'night'), layout="
    assert repr(bn) == f"{words}'NHWC')"
    again = eval(repr(bn), {"BatchNorm": fastbn.BatchNorm})
    assert list(again.state_dict()) == list(bn.state_dict())
    assert repr(fastbn.BatchNorm(CHANNELS, domains=("day",))) == "BatchNorm(5, domains=('day',))"


# ---- Estimated anew ----


@each_backend
@pytest.mark.parametrize("sequential", [True, False])
def test_reestimation(sequential: bool) -> None:
    """A domain's statistics are those that layers of their own would get; others stay."""
    batches = [batch(SHAPE)[i] for i in range(3)]
    options: list[dict[str, Any]] = [{}, {"virtual_batch": 4}]
    layers = [divided(**some) for some in options]
    likes = [alone(bn, "night", **some) for bn, some in zip(layers, options, strict=True)]
    before = [of(copy.deepcopy(bn), "day") for bn in layers]

    def forward(x: Array) -> None:
        layers[1](layers[0](x, domain="night") ** 2, domain="night")

    given: dict[str, Any] = {"sequential": sequential}
    fastbn.reestimate(layers, forward, batches, domain="night", **given)
    fastbn.reestimate(likes, lambda x: likes[1](likes[0](x) ** 2), batches, **given)
    for bn, like, day in zip(layers, likes, before, strict=True):
        assert_same_bits(of(bn, "night"), running(like))
        assert_same_bits(of(bn, "day"), day)
        assert (bn.training, bn.frozen_statistics) == (True, False)
    x = batches[0]
    for bn, like in zip(layers, likes, strict=True):
        bn(x, domain="night")
        like(x)
        assert_same_bits(of(bn, "night"), running(like))


@pytest.mark.parametrize("sequential", [True, False])
def test_calls_in_another_domain_meanwhile(sequential: bool) -> None:
    """They do what they do in training: before the layer's turn, and after."""
    batches = [batch(SHAPE)[i] for i in range(3)]
    layers = [divided(), divided()]
    day = [alone(bn, "day") for bn in layers]

    def forward(x: Array) -> None:
        for bn, like in zip(layers, day, strict=True):
            assert_same_bits({"y": bn(x, domain="day")}, {"y": like(x)})
            bn(x, domain="night")

    fastbn.reestimate(layers, forward, batches, domain="night", sequential=sequential)
    for bn, like in zip(layers, day, strict=True):
        assert_same_bits(of(bn, "day"), running(like))


def test_a_failed_reestimation() -> None:
    """All domains are as they were, and training goes on."""
    (x, _, _), bn = batch(SHAPE), divided()
    before = bn.state_dict()

    def forward(x: Array) -> None:
        bn(x, domain="day")
        bn(x, domain="night")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastbn.reestimate([bn], forward, [x], domain="night")
    assert_same_bits(bn.state_dict(), before)
    like = alone(bn, "night")
    assert_same_bits({"y": bn(x, domain="night")}, {"y": like(x)})
    assert_same_bits(of(bn, "night"), running(like))


@pytest.mark.parametrize(
    ("layers", "domain", "error", "words"),
    [
        ([divided()], None, TypeError, "domain is None, expected one of ... domains of layers[0];"),
        ([divided()], "dusk", ValueError, "domain is 'dusk', expected one of 'day', 'night', the"),
        ([divided(), made()], "day", ValueError, "domain is 'day', ... layers[1] has no domains;"),
        ([divided()], "day", ValueError, "layers[0].running_var.day is read-only"),
    ],
)
def test_bad_reestimations(layers: Any, domain: Any, error: Any, words: str) -> None:
    """Nothing is called, and nothing changes."""
    layers = copy.deepcopy(layers)
    if "read-only" in words:
        layers[0].running("day").var.flags.writeable = False
    with refused(layers[0], error, words):
        fastbn.reestimate(layers, pytest.fail, [batch(SHAPE)[0]], domain=domain)


# ---- What is refused ----

NAMES: list[tuple[Any, type[Exception], str]] = [
    (
        "day",
        TypeError,
        "domains is a str ('day'), expected a list or tuple of names, or None;",
    ),
    (3, TypeError, "domains is an int (3), expected a list or tuple of names"),
    ({"day", "night"}, TypeError, "domains is a set ... expected a list or tuple of names"),
    ((), ValueError, "domains is (), expected one name or more; leave it out for one set"),
    (("day", ""), ValueError, "domains[1] is '', expected a name, a str that is not empty"),
    (("day", 2), TypeError, "domains[1] is 2, expected a name, a str that is not empty"),
    ((None,), TypeError, "domains[0] is None, expected a name"),
    (("a", "b", "a"), ValueError, "domains[2] is 'a', as domains[0] is, expected distinct names"),
]


@pytest.mark.parametrize(("value", "error", "words"), NAMES)
def test_bad_domains(value: Any, error: type[Exception], words: str) -> None:
    """No layer is made."""
    with fails(error, words):
        fastbn.BatchNorm(CHANNELS, domains=value)


def test_domains_without_running_statistics() -> None:
    """There is nothing to keep apart."""
    words = "domains is ('day', 'night'), expected None where track_running_stats is False: there"
    with fails(ValueError, words):
        fastbn.BatchNorm(CHANNELS, domains=DOMAINS, track_running_stats=False)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_bad_calls(mode: str) -> None:
    """An unknown domain, none where there are some, one where there are none."""
    x, _, _ = batch(SHAPE)
    bn, plain, out = made(mode, domains=DOMAINS), made(mode), np.zeros_like(x)
    expected = "expected one of 'day', 'night', the domains of the layer; pass one of them"
    calls: list[Callable[[Any, Any], Any]] = [
        lambda layer, domain: layer(x, out=out, domain=domain),
        lambda layer, domain: layer.forward(x, out=out, domain=domain),
        lambda layer, domain: layer.to_frozen(domain=domain),
        lambda layer, domain: layer.running(domain),
    ]
    for call in calls:
        for domain, error in (("dusk", ValueError), ("", ValueError), (None, TypeError)):
            with refused(bn, error, f"domain is {domain!r}, {expected}", x, out):
                call(bn, domain)
        with refused(bn, TypeError, f"domain is 0, {expected}", x, out):
            call(bn, 0)
        with refused(plain, ValueError, "domain is 'day', expected None: the layer has no dom"):
            call(plain, "day")


def test_messages_name_the_domain() -> None:
    """Of running statistics that are none, or would be none."""
    (x, _, _), bn = batch(SHAPE), divided(nonfinite="raise", dtype="float32")
    wide = x.astype(np.float64)
    wide[:, 1] *= 1e30
    with refused(bn, ValueError, "running_var.night[1] would be inf, expected a finite number"):
        bn(wide, domain="night")
    bn.running("day").mean[2] = np.nan
    for layer in (bn, copy.deepcopy(bn).eval()):
        with refused(layer, ValueError, "running_mean.day[2] is nan: not a number"):
            layer(x, domain="day")
        layer(x, domain="night")
    bn.running("night").num_batches_tracked[...] = -1
    with refused(bn, ValueError, "num_batches_tracked.night is -1, expected a whole number"):
        bn(x, domain="night")


def test_bad_states() -> None:
    """Of a layer without domains or with others, or with a value that is none: nothing changes."""
    bn = divided()
    state = bn.state_dict()
    missing = "missing are 'running_mean.day', 'running_var.day', 'running_mean.night', "
    for other, words in (
        (made(), f"{missing}'running_var.night'; not known are 'running_mean', 'running_var'"),
        (made(domains=("day",)), "missing are 'running_mean.night', 'running_var.night'; make the"),
        (made(domains=(*DOMAINS, "dusk")), "not known are 'running_mean.dusk'"),
    ):
        with refused(bn, ValueError, f"state has not the layer's names, ... {words}"):
            bn.load_state_dict(other.state_dict())
    with refused(plain := made(), ValueError, "... track_running_stats and domains of the one"):
        plain.load_state_dict(state)
    for name, bad, words in (
        ("running_mean.night", np.nan, "running_mean.night[0] is nan: not a number"),
        ("running_var.night", -1.0, "running_var.night[0] is -1.0: a variance cannot be negative"),
    ):
        with refused(bn, ValueError, words):
            bn.load_state_dict(state | {name: np.full(CHANNELS, bad)})
    with refused(bn, ValueError, "state['num_batches_tracked.day'] is -1, expected a whole"):
        bn.load_state_dict(state | {"num_batches_tracked.day": -1})
    network = {f"layer1.bn.{name}": a for name, a in state.items()}
    with refused(bn, ValueError, "state has a network's names, ... set prefix = 'layer1.bn.' and"):
        bn.load_state_dict(network)
