"""Says whether the signal passes through a network as its spec plans, and if not, what is at fault.

Every part is held to its own law, on the signal that really reaches it: an activation with its
gamma keeps unit variance, a standardised kernel has no common mode and keeps the variance, beta
and alpha are the plan's, attention starts as the identity. What pooling and borders take from the
signal breaks none of these laws, so lawful networks pass (docs/signal-propagation.md).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike

from nfflax.insight.spp_flow import BlockFlow, Flow, PartFlow, flow
from nfflax.nn.activations import get_activation
from nfflax.nn.body import Body
from nfflax.spec.schema import Spec

# How far parts may be from their laws. All shipped specs are well inside, by what docs measure.
_VARIANCE = 0.15  # of an activation with its gamma: 7% of gamma; published ones are 0.1% off
_KERNEL = 0.25  # of a kernel's variance: timm's epsilon takes up to 13%
_COMMON = 0.1  # of a kernel's common mode: 0 when standardised, 1 when not
_BETA = 0.01  # first betas are 0.98, so that little tells them from none
_ALPHA = 0.05
_ATTENTION = 0.3  # gates are near 1 while the pooled map is near 0
_LARGEST_ALPHA = 0.5  # a block then adds 0.25 to a variance of 1; the papers' 0.2 adds 0.04
_DEAD = 1e-8  # of what enters: less is nothing
_CONVOLUTION = (0.005, 6.0)  # of what its kernel makes of noise: what borders and photographs leave
_SMALL_MAP = 4  # pixels: of a 4x4 map, a 3x3 convolution sees 69%


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: its kind, what it does to the signal, and why."""

    kind: str
    """`not finite`, `dead activation`, `gamma`, `kernels`, `beta`, `alpha`, `attention` or
    `convolution`."""
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Report:
    """The signal in a network: what was measured, what the plan says, what is wrong."""

    name: str
    flow: Flow
    expected: np.ndarray | None
    """The planned variances of the stem's and every block's output; None under batch
    normalisation, for which there is no plan."""
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    """What is as it should be, but not as one might think."""

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def curves(self) -> dict[str, np.ndarray]:
        """`avg_sq_mean`, `avg_var` and `res_avg_var`, as `nfflax.signals` has them."""
        return self.flow.curves()

    def __str__(self) -> str:
        faults = [f"{self.name}: {fault}" for fault in self.faults]
        return "\n".join(faults or [f"{self.name}: the signal is sound"])


def diagnose(model: Body, x_NHWC: ArrayLike) -> Report:
    """Pass images through a network as it was built, and hold every part to its law.

    N(0, 1) noise tells all there is to tell; real images show what they make of it. Gains that
    start at zero count as one. The model does not change.
    """
    spec, found = model.spec, flow(model, x_NHWC)
    is_normed = spec.norm.kind == "batch"
    laws: list[Callable[[Spec, Flow], Iterable[Fault]]] = [_finite, _alive]
    if not is_normed:
        laws += [_gamma, _kernels, _beta, _alpha, _attention]
    faults = list(itertools.chain.from_iterable(law(spec, found) for law in laws))
    if not faults and not is_normed:
        faults += _convolutions(found)
    return Report(
        spec.name,
        found,
        None if is_normed else _expected(found),
        tuple(faults),
        tuple(_notes(spec, found)),
    )


def _expected(found: Flow) -> np.ndarray:
    """The planned variance of the stem's output and of every block's."""
    planned, stage = [1.0], -1
    for plan in (block.plan for block in found.blocks):
        start = plan.expected_variance if plan.stage == stage else 1.0
        planned.append(start + plan.alpha**2)
        stage = plan.stage
    return np.array(planned)


def _places(found: Flow) -> Iterator[tuple[str, str, PartFlow]]:
    """Every part from the image on: where it is, its name, what it did."""
    order = ("act0", "conv_shortcut", "conv0", "act1", "conv1", "act1b", "conv1b", "act2", "conv2")
    stem = sorted(found.stem.items(), key=lambda item: (item[0][-1], item[0].startswith("convs")))
    yield from (("stem", name, part) for name, part in stem)
    for block in found.blocks:
        for name in order:
            if name in block.parts:
                yield block.plan.name, name, block.parts[name]
    yield from (("the head", name, part) for name, part in found.head.items())


def _activations(found: Flow) -> Iterator[tuple[str, PartFlow, PartFlow | None]]:
    """Every activation, and the convolution after it."""
    for i in range(len(found.stem) // 2):
        yield "stem", found.stem[f"acts.{i}"], found.stem[f"convs.{i + 1}"]
    for block in found.blocks:
        for name, part in block.parts.items():
            if name.startswith("act"):
                yield block.plan.name, part, block.parts[name.replace("act", "conv")]
    if "final_act" in found.head:
        yield "the head", found.head["final_act"], None


def _finite(spec: Spec, found: Flow) -> Iterator[Fault]:
    for where, name, part in _places(found):
        if not math.isfinite(part.var_out):
            what = f"activation `{spec.numerics.activation}`" if "act" in name else name
            entered = "finite values" if math.isfinite(part.var_in) else "values no longer finite"
            text = f"NaN or infinity from {where} on: {what} made it of {entered}"
            yield Fault("not finite", text)
            return


def _alive(spec: Spec, found: Flow) -> Iterator[Fault]:
    for where, name, part in _places(found):
        silent = part.var_in > 0 and part.var_out <= _DEAD * part.var_in
        if "act" in name and (silent or part.gain <= _DEAD):
            text = f"nothing passes {where}: activation `{spec.numerics.activation}` is dead there"
            yield Fault("dead activation", f"{text}, its output is constant")
            return


def _gamma(spec: Spec, found: Flow) -> Iterator[Fault]:
    in_kernels = spec.numerics.gamma == "conv"
    wrong = []
    for where, act, conv in _activations(found):
        if in_kernels and conv is None:
            continue
        kept = act.gain * (conv.gain if in_kernels and conv else 1.0)
        if act.gain > _DEAD and abs(kept - 1) > _VARIANCE:
            wrong.append((where, kept))
    if not wrong:
        return
    where, kept = max(wrong, key=lambda each: _distance(each[1]))
    place = ""
    if len(wrong) < sum(1 for _ in _activations(found)) - 1:
        place = f" in {where}" + " and others" * (len(wrong) > 1)
    after = f"each activation gives {kept:.2g} of the variance it should"
    cause = _gamma_cause(spec, kept)
    yield Fault("gamma", f"{_branch_effect(found)}: {cause}{place}; {after}")


def _gamma_cause(spec: Spec, kept: float) -> str:
    """What is wrong with gamma, from the variance that an activation with it leaves."""
    mode, name = spec.numerics.gamma, spec.numerics.activation
    if mode == "none":
        return f'gamma of `{name}` is not applied (numerics.gamma = "none")'
    missing, used = kept**-0.5, get_activation(name).gamma
    if math.isclose(missing, used, rel_tol=0.02):
        return f'gamma of `{name}` is not applied (numerics.gamma = "{mode}" asks for it)'
    return f"gamma of `{name}` is {used:.4g} and should be {used * missing:.4g}"


def _kernels(spec: Spec, found: Flow) -> Iterator[Fault]:
    numerics = spec.numerics
    scale = get_activation(numerics.activation).gamma ** 2 if numerics.gamma == "conv" else 1.0
    kernels = [(where, name, p) for where, name, p in _places(found) if "conv" in name]
    drifting = [p.common for _, _, p in kernels if p.common > _COMMON]
    off = [(w, n, p.gain / scale) for w, n, p in kernels if abs(p.gain / scale - 1) > _KERNEL]
    if drifting:
        means = [(b.avg_sq_mean / b.avg_var, b) for b in found.blocks if b.avg_var > 0]
        ratio, block = max(means, key=lambda each: each[0], default=(0.0, None))
        drift = f"the squared mean of channels reaches {ratio:.2g} of their variance"
        place = f" at {block.plan.name}" if block else ""
        yield Fault(
            "kernels",
            f"{drift}{place}: weights are not standardised in {len(drifting)} of {len(kernels)} "
            "convolutions, their kernels do not sum to zero",
        )
    if off:
        where, name, kept = max(off, key=lambda each: _distance(each[2]))
        cause = f"the kernels of {len(off)} of {len(kernels)} convolutions do not keep the variance"
        cause += f" of what enters: {kept:.2g} of it remains ({where}, {name})"
        if numerics.ws_eps_mode == "add" and kept < 1:
            cause += f"; numerics.ws_eps = {numerics.ws_eps:g} is large beside their variance"
        yield Fault("kernels", f"{_branch_effect(found)}: {cause}")


def _beta(_: Spec, found: Flow) -> Iterator[Fault]:
    blocks = [block for block in found.blocks if math.isfinite(block.beta)]
    off = [block for block in blocks if abs(block.beta / block.plan.beta - 1) > _BETA]
    if not off:
        return
    worst = max(off, key=lambda block: _distance(block.beta / block.plan.beta))
    power = (worst.beta / worst.plan.beta) ** 2
    effect = f"{worst.plan.name} sees {power:.2g} of the variance it should"
    if all(abs(block.beta - 1) < _BETA for block in blocks):
        told = f"the plan says {worst.plan.beta:.3f} there"
        yield Fault("beta", f"{effect}: beta is not applied, every block multiplies by 1; {told}")
        return
    alphas = np.array([block.plan.alpha for block in found.blocks])
    grown = 1 + np.cumsum(alphas**2) - alphas**2
    if all(abs(b.beta * grown[b.plan.index - found.blocks[0].plan.index] ** 0.5 - 1) < _BETA
           for b in blocks):  # fmt: skip
        cause = "beta is never reset: at a new stage it goes on as if the variance had not fallen"
        yield Fault("beta", f"{effect}: {cause} back to 1")
        return
    said = f"beta of {worst.plan.name} is {worst.beta:.3g}, the plan says {worst.plan.beta:.3g}"
    more = f"; {len(off)} of {len(blocks)} blocks differ from it" if len(off) > 1 else ""
    yield Fault("beta", f"{effect}: {said}{more}")


def _alpha(spec: Spec, found: Flow) -> Iterator[Fault]:
    blocks = [block for block in found.blocks if math.isfinite(block.alpha)]
    off = [block for block in blocks if abs(block.alpha / block.plan.alpha - 1) > _ALPHA]
    if off:
        worst = max(off, key=lambda block: _distance(block.alpha / block.plan.alpha))
        said = f"alpha of {worst.plan.name} is {worst.alpha:.3g}, not {worst.plan.alpha:g}"
        more = f"; {len(off)} of {len(blocks)} blocks differ from it" if len(off) > 1 else ""
        yield Fault("alpha", f"{_growth_effect(found)}: {said}{more}")
    elif spec.block.alpha > _LARGEST_ALPHA:
        alpha = spec.block.alpha
        cause = f"block.alpha = {alpha:g} lets every block add {alpha**2:.2g} to a variance of 1"
        yield Fault("alpha", f"{_growth_effect(found)}: {cause}; the papers' 0.2 adds 0.04")


def _attention(spec: Spec, found: Flow) -> Iterator[Fault]:
    off = [block for block in found.blocks if abs(block.attention - 1) > _ATTENTION]
    if off and not found.trained:
        worst, table = max(off, key=lambda block: _distance(block.attention)), spec.attention
        effect = f"attention gives {worst.attention:.2g} of the branch's variance"
        cause = f"attention.gain = {table.gain:g}, and 2 makes the gate 1 at the start"
        yield Fault("attention", f"{effect} in {worst.plan.name}: {cause}")


def _convolutions(found: Flow) -> Iterator[Fault]:
    """What no kernel accounts for."""
    low, high = _CONVOLUTION
    for where, name, part in _places(found):
        if "conv" in name and not found.trained:
            kept = part.var_out / (part.var_in * part.gain) if part.var_in * part.gain else math.nan
            if not low < kept < high:
                text = f"{name} in {where} gives {kept:.2g} of the variance that its kernel would"
                yield Fault("convolution", text)
                return


def _notes(spec: Spec, found: Flow) -> Iterator[str]:
    if found.revived:
        yield "gains that start at zero are taken as ones: else every branch would be silent"
    if found.trained:
        yield "gains have trained: what attention and whole convolutions do is not judged"
    if spec.norm.kind == "batch":
        yield "batch normalisation, with the statistics of this batch: there is no planned variance"
        return
    if spec.stem.pool == "max":
        yield (
            "the stem's max-pool moves the signal away from 0, where no gamma is exact: it has "
            f"variance {found.stem_var:.2g} and squared mean {found.stem_sq_mean:.2g} there"
        )
    if spec.numerics.gamma == "conv":
        gamma = get_activation(spec.numerics.activation).gamma
        yield (
            'numerics.gamma = "conv": the first kernel has gamma too, so all variances lie '
            f"{gamma**2:.3g} times as high as planned"
        )
    left = _expected(found)[1:]
    kept = [block.avg_var / planned for block, planned in zip(found.blocks, left, strict=True)]
    if spec.stages.shortcut == "avgpool+1x1" and kept and min(kept) < 0.5:
        place = found.blocks[int(np.argmin(kept))].plan.name
        yield (
            "average-pooled shortcuts keep what neighbouring pixels share, of noise a quarter: "
            f"{place} returns {min(kept):.2g} of the planned variance"
        )
    for block, size in zip(found.blocks, found.sizes, strict=True):
        if max(size) <= _SMALL_MAP:
            height, width = size
            yield (
                f"maps of {block.plan.name} on are {height}x{width}: convolutions see zeros around "
                f"them, and its branch keeps {_kept(block):.2g} of the variance"
            )
            break


def _kept(block: BlockFlow) -> float:
    """What a block's branch makes of the variance that enters it; planned is 1."""
    entered = block.parts["act0"].var_in * block.plan.beta**2
    return block.res_avg_var / entered if entered > 0 else math.nan


def _branch_effect(found: Flow) -> str:
    blocks = [block for block in found.blocks if _kept(block) > 0]
    if not blocks:
        return "nothing passes the branches"
    block = max(blocks, key=lambda block: _distance(_kept(block)))
    return f"the branch of {block.plan.name} ends with {_kept(block):.2g} of the variance it gets"


def _growth_effect(found: Flow) -> str:
    """How the variance grows in the stage where that is furthest from the plan."""
    planned = _expected(found)[1:]
    told = []
    both = zip(found.blocks, planned.tolist(), strict=True)
    for stage, group in itertools.groupby(both, key=lambda pair: pair[0].plan.stage):
        (first, start), *rest = group
        if rest and first.avg_var > 0 and rest[-1][0].avg_var > 0:
            (last, end), steps = rest[-1], len(rest)
            rate, plan = ((b / a) ** (1 / steps) for a, b in
                          ((first.avg_var, last.avg_var), (start, end)))  # fmt: skip
            text = f"the variance grows {rate:.2f}x per block in stage {stage}, planned {plan:.2f}x"
            told.append((abs(math.log(rate / plan)), text))
    if told:
        return max(told)[1]
    last = found.blocks[-1]
    return f"the variance is {last.avg_var:.2g} after {last.plan.name}"


def _distance(ratio: float) -> float:
    """How far a ratio is from 1, either way."""
    return abs(math.log(max(ratio, 1e-30)))
