"""Cells that submitit runs as jobs, of Slurm or of this machine: what Hydra's launcher leaves open.

Its launcher gives up at the first job that is lost (out of time or of memory, `scancel`), while the
others still run. Here a lost job is one failed cell. A job that is preempted is no lost one: Slurm,
or submitit, puts it into the queue again, and its run goes on from the last checkpoint.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ghosttrain.config.hydra_words import launcher_of
from ghosttrain.errors import UserError
from ghosttrain.text import one_line

ENVIRONMENT = {"SLURM_KILL_BAD_EXIT": "1"}
"""Variables of the jobs: srun ends all tasks of a cell when one fails (srun's manual)."""


@contextmanager
def jobs_of(hydra_words: Sequence[str]) -> Iterator[None]:
    """Wait inside this block for all jobs of a sweep, whatever became of one; nothing where the
    launcher in `hydra_words` is none of submitit.

    Raises:
        UserError: no Slurm here, or it refuses the jobs.
    """
    name = launcher_of(hydra_words)
    if not name.startswith("submitit_"):
        yield
        return
    for program in ("sbatch", "srun"):
        if name == "submitit_slurm" and shutil.which(program) is None:
            raise UserError(
                f"hydra/launcher={name}: there is no {program} here: type the command on a machine "
                "of the cluster, or hydra/launcher=submitit_local"
            )
    from hydra.core.utils import JobReturn, JobStatus
    from submitit.core.core import Job
    from submitit.core.utils import DelayedSubmission, FailedSubmissionError, UncompletedJobError

    results_of, dump_of = Job.results, DelayedSubmission.dump

    def dump(submission: Any, path: str | Path, *rest: Any) -> None:
        # What lies there is run: nobody else may enter, whatever `hydra.sweep.dir` says.
        Path(path).parent.chmod(0o700)
        dump_of(submission, path, *rest)

    def results(job: Any) -> list[Any]:
        try:
            return results_of(job)
        except UncompletedJobError:
            print(
                f"ghosttrain: job {job.job_id} ended without a result (state {job.state}); what it "
                f"wrote: {job.paths.stderr}",
                file=sys.stderr,
            )
            return [JobReturn(_return_value=None, status=JobStatus.COMPLETED)]

    try:
        with (
            patch.object(Job, "results", results),
            patch.object(DelayedSubmission, "dump", dump),
            patch.dict(os.environ, ENVIRONMENT),
        ):
            yield
    except UserError:
        raise
    except (UncompletedJobError, FailedSubmissionError, ValueError) as error:
        raise UserError(f"hydra/launcher={name}: {one_line(error)[:500]}") from None
