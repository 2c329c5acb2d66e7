"""Memory, FLOPs and seconds of a job before it starts (`nlu plan`)."""

from extensions.planner.devices import GPUS, PlanOptions
from extensions.planner.plan import Planner
from extensions.planner.tables import plan_tables

__all__ = ["GPUS", "PlanOptions", "Planner", "plan_tables"]
