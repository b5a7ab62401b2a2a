"""pulse_ray: thought-space recommendation (PULSE, arXiv 2510.08626) on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
