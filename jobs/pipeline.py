"""Every stage that is not complete, as a job: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
