//! Rejects addresses that are not publicly routable, so that a definition cannot read internal services.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use url::{Host, Url};

/// A host with a private address.
#[derive(Debug, thiserror::Error)]
#[error("{host} is a private address; set source.allow_private = true to allow it")]
pub struct PrivateAddress {
    host: String,
}

/// Resolves names to public addresses only. Checking each resolution also covers names whose address changes (DNS
/// rebinding).
#[derive(Debug)]
pub struct PublicResolver;

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            if found.iter().any(|address| is_private(address.ip())) {
                return Err(PrivateAddress { host }.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Rejects a URL whose host is a private address. [`PublicResolver`] checks names.
pub fn check_address(url: &Url) -> Result<(), PrivateAddress> {
    let address = match url.host() {
        Some(Host::Ipv4(v4)) => IpAddr::V4(v4),
        Some(Host::Ipv6(v6)) => IpAddr::V6(v6),
        _ => return Ok(()),
    };
    if is_private(address) { Err(PrivateAddress { host: address.to_string() }) } else { Ok(()) }
}

/// Whether an address is not publicly routable, such as private, local and reserved addresses.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_private_v4(v4),
        IpAddr::V6(v6) => is_private_v6(v6),
    }
}

fn is_private_v4(a: Ipv4Addr) -> bool {
    let [first, second, third, _] = a.octets();
    a.is_private()
        || a.is_loopback()
        || a.is_link_local()
        || a.is_multicast()
        || a.is_documentation()
        || first == 0
        || first >= 240
        // Carrier-grade NAT (RFC 6598), protocol assignments (RFC 6890), benchmarks (RFC 2544).
        || (first == 100 && (64..128).contains(&second))
        || (first == 192 && second == 0 && third == 0)
        || (first == 198 && (18..20).contains(&second))
}

fn is_private_v6(a: Ipv6Addr) -> bool {
    let s = a.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    a.is_loopback()
        || a.is_unspecified()
        || a.is_multicast()
        || a.is_unique_local()
        || a.is_unicast_link_local()
        // Site-local (RFC 3879), discard (RFC 6666), documentation (RFC 3849, RFC 9637), segment routing (RFC 9602).
        || (s[0] & 0xffc0 == 0xfec0)
        || s[..4] == [0x100, 0, 0, 0]
        || s[..2] == [0x2001, 0xdb8]
        || (s[0] == 0x3fff && s[1] < 0x1000)
        || s[0] == 0x5f00
        // Protocol assignments (RFC 2928), including Teredo, which reaches hosts behind a NAT.
        || (s[0] == 0x2001 && s[1] < 0x200)
        // Local NAT64 (RFC 8215), whose targets depend on the local network.
        || s[..3] == [0x64, 0xff9b, 1]
        // Embedded IPv4 addresses: mapped, compatible (RFC 4291), translated (RFC 2765), NAT64 (RFC 6052), 6to4 (RFC
        // 3056).
        || a.to_ipv4_mapped().is_some_and(is_private_v4)
        || (s[..6] == [0; 6] && is_private_v4(v4(s[6], s[7])))
        || (s[..6] == [0, 0, 0, 0, 0xffff, 0] && is_private_v4(v4(s[6], s[7])))
        || (s[..6] == [0x64, 0xff9b, 0, 0, 0, 0] && is_private_v4(v4(s[6], s[7])))
        || (s[0] == 0x2002 && is_private_v4(v4(s[1], s[2])))
}

#[cfg(test)]
mod tests {
    use super::is_private;

    #[test]
    fn public_addresses_are_not_private() {
        for address in
            ["1.1.1.1", "100.128.0.1", "192.0.1.1", "198.20.0.1", "2606:4700::1111", "64:ff9b::808:808"]
        {
            assert!(!is_private(address.parse().unwrap()), "{address}");
        }
        for address in [
            "0.0.0.0",
            "255.255.255.255",
            "198.18.0.1",
            "fe80::1",
            "fd00::1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "64:ff9b:1::808:808",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "fec0::1",
            "feff::1",
            "::10.0.0.1",
            "::ffff:0:10.0.0.1",
            "2001:db8::1",
            "100::1",
            "3fff::1",
            "5f00::1",
        ] {
            assert!(is_private(address.parse().unwrap()), "{address}");
        }
    }
}
