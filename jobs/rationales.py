"""The stage `rationales` as a job: `ray job submit --working-dir . -- python jobs/rationales.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["rationales", *sys.argv[1:]])
