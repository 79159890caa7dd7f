"""Global scheduling: placement, admission, replication, estimators. Pure Python (floor 3)."""

from serving.conductor.conductor import Conductor as Conductor
from serving.conductor.conductor import ConductorConfig as ConductorConfig
from serving.conductor.estimators import TimeModel as TimeModel
from serving.conductor.mirror import ClusterMirror as ClusterMirror
from serving.conductor.roles import RoleConfig as RoleConfig
from serving.conductor.types import SLO as SLO
from serving.conductor.types import Deferral as Deferral
from serving.conductor.types import Placement as Placement
from serving.conductor.types import PrefillReport as PrefillReport
from serving.conductor.types import Rejection as Rejection
