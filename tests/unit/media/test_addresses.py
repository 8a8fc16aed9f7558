from __future__ import annotations

import pytest

from trtllm_workers.media.addresses import host_of, is_listed, may_connect

PUBLIC = ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]

PRIVATE = [
    *("127.0.0.1", "127.255.0.1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("100.64.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.5", "240.0.0.1", "192.88.99.1"),
    *(
        "::1",
        "fd12::1",
        "fc00::1",
        "2001:db8::1",
        "2001:0:808:808::f7f7:f7f7",
        "2002:808:808::1",
        "3fff::1",
        "::8.8.8.8",
    ),
    *(
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "64:ff9b:1::a00:1",
    ),
    *("2002:7f00:1::1", "100::1", "5f00::1", "4000::1"),
]

NEVER = [
    *("169.254.169.254", "169.254.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255"),
    *("100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("::", "fe80::1", "febf::1", "fec0::1", "ff02::1", "fd00:ec2::254", "fd20:ce::254"),
    *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254"),
    *("fe80::1%eth0", "2606:4700::1111%1", "not an address", "", "0x7f.1"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_good(address: str) -> None:
    assert may_connect(address, listed=False)
    assert may_connect(address, listed=True)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_only_for_listed_hosts(address: str) -> None:
    assert not may_connect(address, listed=False)
    assert may_connect(address, listed=True)


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_never(address: str) -> None:
    assert not may_connect(address, listed=False)
    assert not may_connect(address, listed=True)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("a_b.example", "a_b.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("127。0。0。1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("0:0::0001", "::1"),
        ("1.2.3.4.", "1.2.3.4"),
        ("4.example", "4.example"),
    ],
)
def test_hosts_have_one_spelling(text: str, host: str) -> None:
    assert host_of(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "a..b", "-a.example", "a b", "a/b", "a@b", "a%2eb", "a\\b"),
        *("2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.1", "1.2.3", "1.2.3.4.5"),
        *(
            "127.0.0.1..",
            "256.0.0.1",
            "a.0x1",
            "fe80::1%eth0",
            "[::1",
            "[1.2.3.4]",
            "a" * 64,
            "x." * 200,
        ),
    ],
)
def test_what_is_no_host(text: str) -> None:
    assert host_of(text) is None


def test_lists_of_hosts() -> None:
    allowed = ("Images.Internal.", "10.0.0.5:8080", "[fd12::1]:81", "fd12::2", "bücher.example")
    assert is_listed("images.internal", 443, allowed)
    assert is_listed("images.internal", 8080, allowed)
    assert is_listed("10.0.0.5", 8080, allowed)
    assert not is_listed("10.0.0.5", 80, allowed)
    assert is_listed("fd12::1", 81, allowed)
    assert not is_listed("fd12::1", 82, allowed)
    assert is_listed("fd12::2", 9, allowed)
    assert is_listed("xn--bcher-kva.example", 80, allowed)
    assert not is_listed("x.images.internal", 443, allowed)
    assert not is_listed("internal", 443, allowed)
    assert not is_listed("images.internal", 443, ())
