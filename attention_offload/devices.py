"""The device table: what an accelerator computes, holds, moves and costs."""

import dataclasses
import math
import os
import pathlib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from attention_offload.errors import DeviceTableError, UnknownDeviceError

TABLE = pathlib.Path(__file__).with_name("devices.toml")
PRICE_BOOKS = ("market", "paper")
KINDS = ("gpu", "tpu", "cpu", "pim")

# Field of a device file -> (field of `Device`, factor to FLOP/s, bytes, bytes per second or watts).
_FIGURES = {
    "memory_gb": ("memory_bytes", 1e9),
    "memory_tb_s": ("memory_bandwidth", 1e12),
    "link_gb_s": ("link_bandwidth", 1e9),
    "network_gbit_s": ("network_bandwidth", 1e9 / 8),
}
_FIELDS = {"kind", "tflops", "power_w", "source", "price", "price_source", *_FIGURES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator (or one CPU server), as rented.

    `flops` are dense peaks in FLOP/s by dtype; `memory_bytes` its capacity; bandwidths are bytes per second, links and
    network in one direction; `price_per_hour` dollars, infinite where the price book has none; `power_w` is None where
    the vendor keeps it.
    """

    name: str
    kind: str
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    price_per_hour: float
    power_w: float | None = None
    source: str = ""
    price_source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DeviceTableError(f"Device `{self.name}` has kind `{self.kind}`; known: {', '.join(KINDS)}.")
        figures = {field: getattr(self, field) for field, _ in _FIGURES.values()}
        figures |= {f"flops of {dtype}": value for dtype, value in self.flops.items()}
        figures |= {"price_per_hour": self.price_per_hour}
        for field, value in figures.items():
            if not value > 0:
                raise DeviceTableError(f"Device `{self.name}`: {field} must be positive, got {value}.")
        if "bfloat16" not in self.flops:
            raise DeviceTableError(f"Device `{self.name}` needs a bfloat16 peak; it lists {', '.join(self.flops)}.")

    def peak_flops(self, dtype: str = "bfloat16") -> float:
        """Dense peak in FLOP/s. A dtype that the device does not multiply natively is computed in bfloat16."""
        return self.flops.get(dtype, self.flops["bfloat16"])

    def ridge(self, dtype: str = "bfloat16") -> float:
        """FLOP per byte from which an operator is compute-bound (the ridge of the roofline)."""
        return self.peak_flops(dtype) / self.memory_bandwidth

    @property
    def priced(self) -> bool:
        """Whether the price book that the table was read with lists this device."""
        return math.isfinite(self.price_per_hour)


class DeviceTable(Mapping[str, Device]):
    """Devices by name; names match whatever their case, spaces, dashes and underscores."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices = {_key(device.name): device for device in devices}

    def __getitem__(self, name: str) -> Device:
        try:
            return self._devices[_key(name)]
        except KeyError:
            raise UnknownDeviceError(
                f"No device `{name}`; known: {', '.join(self)}. Describe others in a TOML file like {TABLE.name}."
            ) from None

    def __iter__(self):
        return (device.name for device in self._devices.values())

    def __len__(self) -> int:
        return len(self._devices)


def load_devices(prices: str = "market", extra: str | os.PathLike[str] | None = None) -> DeviceTable:
    """Reads the built-in table, then the user's: `extra` is a TOML file of the same shape that adds devices or replaces
    single figures of known ones. A price there may be one number, which then holds in every price book.

    `prices` names the price book, "market" (2026 rental) or "paper" (Lamina Table 1). Raises `DeviceTableError` naming
    the device and the figure that is missing, unknown or not positive.
    """
    if prices not in PRICE_BOOKS:
        raise DeviceTableError(f"No price book `{prices}`; known: {', '.join(PRICE_BOOKS)}.")
    tables = _read(TABLE)
    if extra is not None:
        names = {_key(name): name for name in tables}
        for name, figures in _read(pathlib.Path(extra)).items():
            known = names.get(_key(name), name)
            stale = {"price_source"} if "price" in figures else set()
            kept = {field: value for field, value in tables.get(known, {}).items() if field not in stale}
            tables[known] = kept | figures
    return DeviceTable(_device(name, figures, prices) for name, figures in tables.items())


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise DeviceTableError(f"Cannot read the device file {path}: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise DeviceTableError(f"The device file {path} is not TOML: {error}.") from error
    for name, figures in tables.items():
        if not isinstance(figures, dict):
            raise DeviceTableError(f"{path}: `{name}` must be a table of figures, got {figures!r}.")
        if unknown := figures.keys() - _FIELDS:
            named, known = ", ".join(sorted(unknown)), ", ".join(sorted(_FIELDS))
            raise DeviceTableError(f"{path}: device `{name}` has unknown fields {named}; known: {known}.")
    return tables


def _device(name: str, figures: Mapping[str, Any], prices: str) -> Device:
    if missing := {"kind", "tflops", "price", *_FIGURES} - figures.keys():
        raise DeviceTableError(f"Device `{name}` lacks {', '.join(sorted(missing))}.")
    price, price_source = figures["price"], figures.get("price_source", "the user's device file")
    if isinstance(price, Mapping):
        price = price.get(prices, math.inf)
    if isinstance(price_source, Mapping):
        price_source = price_source.get(prices, "")
    try:
        return Device(
            name=name,
            kind=figures["kind"],
            flops={dtype: float(value) * 1e12 for dtype, value in figures["tflops"].items()},
            price_per_hour=float(price),
            power_w=figures.get("power_w"),
            source=figures.get("source", ""),
            price_source=price_source,
            **{field: float(figures[column]) * factor for column, (field, factor) in _FIGURES.items()},
        )
    except (TypeError, AttributeError) as error:
        raise DeviceTableError(f"Device `{name}`: a figure is not a number ({error}).") from error
