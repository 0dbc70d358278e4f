"""What a check has found, in sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

from kitsune.ir import Launch, Op


@dataclass(frozen=True)
class Difference:
    """A region that gave something else than eager: the first operator whose value is wrong, its line, and how it is wrong.

    `kernel` and `kernel_ops` are those of the fused kernel that computed it, if one did. `reproduction` is a Python file that
    shows it, empty where it could not be written; `problem` is what else there is to know of it.
    """

    operator: str
    site: str
    sentence: str
    kernel: str = ""
    kernel_ops: tuple[str, ...] = ()
    reproduction: str = ""
    problem: str = ""

    def __str__(self) -> str:
        text = f"Kitsune and eager differ at {self.operator}, {self.site}: {self.sentence}."
        if self.kernel:
            text += f" It is computed by the kernel {self.kernel}, of {', '.join(self.kernel_ops)}."
        if self.reproduction:
            text += f" To see it again: python {self.reproduction}"
        return f"{text} {self.problem}".rstrip() if self.problem else text


@dataclass
class CheckReport:
    """What `kitsune.verify` has seen. `str(report)` is the text that users read; it is true where everything was equal.

    `regions` are the runs of regions that were checked, `values` the results and written tensors that were compared, `rounded`
    those runs in which some differ in rounding as the grade of numerics allows; `kernels` counts launches of kernels, `replays`
    runs as a CUDA graph; `observed` are operators that eager ran itself.
    """

    steps: int = 0
    regions: int = 0
    values: int = 0
    rounded: int = 0
    kernels: int = 0
    replays: int = 0
    observed: int = 0
    numerics: str = "strict"
    differences: list[Difference] = field(default_factory=list)
    # Why runs could not be checked, as sentences.
    problems: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Was something compared, all of what was to be, and every value eager's?"""
        return self.regions > 0 and not self.differences and not self.problems

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        ran = f"{self.steps} steps: {self.regions} runs of regions were checked, {self.values} tensors compared"
        lines = [f"{ran} ({self.observed} operators were observed, which is eager itself)."]
        if not self.regions:
            lines.append("Nothing was recorded, so that nothing could be checked; kitsune.explain() says why.")
        if self.regions:
            how = f"had {self.kernels} launches of kernels" if self.kernels else "had no kernels: each operator was run by itself"
            lines.append(f"The runs {how}. Replays of CUDA graphs among them: {self.replays}.")
        if self.rounded:
            what = "values are rounded otherwise" if self.numerics == "fast" else "sums are in another order"
            lines.append(f"In {self.rounded} runs, {what} than eager's, as numerics={self.numerics!r} allows.")
        lines += [*map(str, self.differences), *self.problems]
        if self.equal:
            lines.append("Everything is equal to eager" + (" within that." if self.rounded else ", bit for bit."))
        return "\n".join(lines)


def described(op: Op | None) -> tuple[str, str]:
    """An op and its line, as a difference has them."""
    if op is None:
        return "an operator that Kitsune has put in", "no line of Python"
    return str(op.target), str(op.site) if op.site is not None else "no line of Python (a thread of autograd's)"


def kernel_of(launch: Launch | None) -> tuple[str, tuple[str, ...]]:
    """The name and the ops of a launch's kernel, with their lines."""
    if launch is None or not launch.kernels:
        return "", ()
    return launch.name, tuple(f"{op.target} ({op.site or 'no line'})" for op in launch.ops)
