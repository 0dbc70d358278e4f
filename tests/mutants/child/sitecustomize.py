"""Imported by Python at its start, in the processes that a traced test starts: they are traced as that test."""

import atexit
import os

if "MUTANTS_CONTEXT" in os.environ:
    from tests.mutants import trace

    tracer = trace.start(os.environ["MUTANTS_CONTEXT"])

    @atexit.register
    def save() -> None:
        tracer.stop()
        tracer.save()
