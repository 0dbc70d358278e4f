"""Plans as text: a line for each launch, and why ops were not put together."""

from kitsune.ir.plan import Plan

MIB = 1 << 20


def plan_text(plan: Plan) -> str:
    """The plan as a table: number, stream, name, operators, bytes moved and modelled microseconds of each launch."""
    n_kernels = sum(bool(launch.kernels) for launch in plan.launches)
    micros = sum(launch.micros for launch in plan.launches)
    lines = [
        f"plan: {plan.n_recorded} operators, {plan.n_launches} launches of which {n_kernels} are fused kernels, "
        f"arena {plan.arena / MIB:.1f} MiB, {micros:.1f} us modelled"
    ]
    shown = [launch for launch in plan.launches if not launch.host_only]
    width = max((len(launch.name) for launch in shown), default=0)
    for k, launch in enumerate(shown):
        lines.append(
            f"{k:5d}  s{launch.stream}  {launch.name:{width}s} {len(launch.ops):4d} ops {launch.nbytes / MIB:9.2f} MiB "
            f"{launch.micros:9.1f} us"
        )
    lines.append("not fused:" if plan.refusals else "nothing was refused")
    lines += [f"{n:5d} x {reason}" for reason, n in plan.refusal_counts().most_common()]
    return "\n".join(lines)
