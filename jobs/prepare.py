"""The stage `prepare` as a job: `ray job submit --working-dir . -- python jobs/prepare.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
