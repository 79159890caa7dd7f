"""The device table: the paper's figures, the user's own file, and clear errors."""

import math
import pathlib

import pytest

from attention_offload.devices import PRICE_BOOKS, load_devices
from attention_offload.errors import DeviceTableError, UnknownDeviceError


def test_table_1_of_the_paper() -> None:
    table = load_devices("paper")
    per_dollar = {
        name: (
            table[name].peak_flops() / 1e12 / table[name].price_per_hour,
            table[name].memory_bandwidth / 1e12 / table[name].price_per_hour,
            table[name].memory_bytes / 1e9 / table[name].price_per_hour,
        )
        for name in ("H100", "H20", "TPU v6e")
    }
    assert per_dollar["H100"] == pytest.approx((89, 0.303, 7.2), rel=5e-3)
    assert per_dollar["H20"] == pytest.approx((32, 0.864, 20.7), rel=5e-3)
    assert per_dollar["TPU v6e"] == pytest.approx((340, 0.607, 11.9), rel=5e-3)


@pytest.mark.parametrize("prices", PRICE_BOOKS)
def test_every_figure_has_a_source(prices: str) -> None:
    for device in load_devices(prices).values():
        assert device.source
        assert bool(device.price_source) == device.priced


def test_names_match_however_they_are_written() -> None:
    table = load_devices()
    assert table["RTX 3090"] is table["rtx-3090"] is table["rtx3090"]


def test_a_user_file_adds_devices_and_replaces_single_figures(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        [H100]
        price = 1.5
        [mi300x]
        kind = "gpu"
        tflops = { bfloat16 = 1307 }
        memory_gb = 192
        memory_tb_s = 5.3
        link_gb_s = 448
        network_gbit_s = 400
        price = { market = 3.0 }
        """
    )
    table = load_devices("market", extra=file)
    assert table["h100"].price_per_hour == 1.5
    assert table["h100"].memory_bytes == 80e9
    assert table["MI300X"].ridge() == pytest.approx(1307 / 5.3)
    assert math.isinf(load_devices("paper", extra=file)["mi300x"].price_per_hour)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[h100]\nprice = -1", r"`h100`: price_per_hour must be positive, got -1"),
        ("[h100]\nmemory_gb = 0", r"`h100`: memory_bytes must be positive, got 0"),
        ("[h100]\ntflops = { int8 = 5 }", r"`h100` needs a bfloat16 peak; it lists int8"),
        ("[h100]\nmemory = 80", r"unknown fields memory; known: kind, link_gb_s"),
        ("[new]\nkind = 'gpu'", r"`new` lacks link_gb_s, memory_gb"),
        ("[h100]\nkind = 'fpga'", r"kind `fpga`; known: gpu, tpu, cpu, pim"),
        ("h100 = 5", r"`h100` must be a table of figures, got 5"),
        ("[h100", r"is not TOML"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path: pathlib.Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(DeviceTableError, match=message):
        load_devices(extra=file)


def test_unknown_names_are_clear_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UnknownDeviceError, match=r"No device `h1000`; known: h100, h20"):
        load_devices()["h1000"]
    with pytest.raises(DeviceTableError, match=r"No price book `spot`; known: market, paper"):
        load_devices("spot")
    with pytest.raises(DeviceTableError, match=r"Cannot read the device file"):
        load_devices(extra=tmp_path / "absent.toml")
