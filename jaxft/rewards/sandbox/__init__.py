"""Python programs that nobody has read, run where the kernel lets them do no harm, and tests of them that they cannot
forge.

`client` is what the rest of jaxft calls. Everything else here runs in the sandbox's server: a process of its own that
has never seen the run, its environment or its files, and that forks for each program. It has the standard library only
and imports these modules under the name `sandbox`, which is why they import each other relatively.

A program (`candidate`) and its tests (`examiner`) are two processes, each confined for itself. The program hears which
of its functions is called with what; it answers with plain data (`values`), which the examiner compares. So what the
right answers are, and the verdict, are never in the memory of the program.
"""
