"""How much of the TBT SLO may be used by forecasts, learned from those that were wrong."""


class LearnedLimit:
    """Share of the TBT SLO up to which to admit, so that a share `goal` of the finished requests misses it.

    Stochastic quantile tracking: every miss lowers the limit, every request in time raises it, in the ratio that
    balances at the goal.
    """

    _RATE, _LEAST = 0.004, 0.6

    def __init__(self, goal: float = 0.1) -> None:
        self.value = 1.0
        self._goal = goal

    def observe(self, missed: bool) -> None:
        self.value = min(1.0, max(self._LEAST, self.value * (1 + self._RATE * (self._goal - missed))))
