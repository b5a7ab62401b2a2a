"""The stage `select` as a job: `ray job submit --working-dir . -- python jobs/select.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
