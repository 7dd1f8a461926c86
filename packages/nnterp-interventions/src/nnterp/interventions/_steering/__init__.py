"""What a steering does and what it breaks, over layers and factors."""

from nnterp.interventions._steering._sweep import SteeringSweep, steering_sweep

__all__ = ["SteeringSweep", "steering_sweep"]
