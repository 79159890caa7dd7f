"""Network interfaces of a cluster, and the transfers that are booked on them."""

from collections.abc import Sequence


class Links:
    """Full-duplex NICs by number: transfers in one direction follow one another, at full bandwidth."""

    def __init__(self, counts: Sequence[int]) -> None:
        """`counts` are the NICs behind each number; several NICs, as a group of nodes has, share each transfer."""
        self.counts = list(counts)
        self._send_free_s = [0.0] * len(counts)
        self._receive_free_s = [0.0] * len(counts)

    def wait_s(self, sender: int, receiver: int, now: float) -> float:
        """Returns the seconds until a transfer could start."""
        return max(0.0, self._send_free_s[sender] - now, self._receive_free_s[receiver] - now)

    def book(self, sender: int, receiver: int, seconds: float, since_s: float) -> float:
        """Books a transfer from `since_s` on, as soon as both sides are free; returns its end.

        `seconds` is what the transfer takes between single NICs.
        """
        send, receive = self._send_free_s, self._receive_free_s
        start_s = max(since_s, send[sender], receive[receiver])
        send[sender] = start_s + seconds / self.counts[sender]
        receive[receiver] = start_s + seconds / self.counts[receiver]
        return max(send[sender], receive[receiver])

    def reset(self, number: int) -> None:
        """Drops what is booked on one side; the other sides keep their bookings."""
        self._send_free_s[number] = self._receive_free_s[number] = 0.0
