//! Which addresses are one server, and where redirects lead.

use ureq::http::Uri;

/// A server, as far as it matters who may read a token: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    is_https: bool,
    /// In lower case.
    host: String,
    /// The scheme's own where the address names none.
    port: u16,
}

impl Origin {
    /// The server of an address.
    ///
    /// # Errors
    /// What is wrong with an address that is no server's or that two programs could read
    /// differently.
    pub(super) fn of(address: &Uri) -> Result<Origin, &'static str> {
        let is_https = match address.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("it is neither http nor https"),
        };
        let authority = address.authority().ok_or("it names no host")?.as_str();
        if authority.contains('@') {
            return Err("it holds a user name");
        }
        // The colons of an IPv6 address are in brackets.
        let name_end = authority.rfind(']').map_or(0, |end| end + 1);
        let (host, port) = match authority[name_end..].find(':') {
            Some(colon) => {
                let (host, port) = authority.split_at(name_end + colon);
                (host, &port[1..])
            }
            None => (authority, ""),
        };
        let port = match (port, is_https) {
            ("", true) => 443,
            ("", false) => 80,
            (port, _) if port.bytes().all(|b| b.is_ascii_digit()) => {
                port.parse().map_err(|_| "its port is none")?
            }
            _ => return Err("its port is none"),
        };
        if host.is_empty() {
            return Err("it names no host");
        }
        Ok(Origin {
            is_https,
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

/// Where a redirect leads: an address of its own, or one that is relative to where it was given.
///
/// # Errors
/// What is wrong with it. Nothing leads from https to http.
pub(super) fn redirected(from: &Uri, location: &str) -> Result<Uri, &'static str> {
    const NONE: &str = "it redirects to what is no address";
    let (scheme, authority) = (from.scheme_str(), from.authority());
    let (scheme, authority) = (scheme.ok_or(NONE)?, authority.ok_or(NONE)?);
    let path = from.path();
    let has_scheme = location.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    });
    let absolute = if has_scheme {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{path}{location}")
    } else {
        let directory = path.rfind('/').map_or("/", |end| &path[..=end]);
        format!("{scheme}://{authority}{directory}{location}")
    };
    let next: Uri = absolute.parse().map_err(|_| NONE)?;
    let origin = Origin::of(&next)?;
    if scheme == "https" && !origin.is_https {
        return Err("it redirects from https to http");
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(address: &str) -> Result<Origin, &'static str> {
        Origin::of(&address.parse().map_err(|_| "no address")?)
    }

    #[test]
    fn one_server_has_one_origin_however_it_is_written() {
        for (one, other) in [
            ("http://hub.example", "http://hub.example:80/x/y?z"),
            ("https://hub.example", "HTTPS://Hub.Example:443/"),
            ("https://hub.example:8443/a", "https://HUB.example:8443/b"),
            ("http://[::1]", "http://[::1]:80"),
            ("http://127.0.0.1:", "http://127.0.0.1/"),
        ] {
            assert_eq!(origin(one), origin(other), "{one} {other}");
            assert!(origin(one).is_ok(), "{one}");
        }
    }

    #[test]
    fn scheme_host_and_port_tell_servers_apart() {
        let home = origin("https://hub.example").unwrap();
        for other in [
            "http://hub.example",
            "http://hub.example:443",
            "https://hub.example:80",
            "https://hub.example:4430",
            "https://hub.example.",
            "https://hub.example.evil",
            "https://evil-hub.example",
            "https://cdn.hub.example",
            "https://hub.example%2eevil",
        ] {
            assert_ne!(origin(other).ok().as_ref(), Some(&home), "{other}");
        }
        assert_ne!(origin("http://[::1]:1"), origin("http://[::1]:2"));
        assert_ne!(origin("http://127.0.0.1"), origin("http://127.1"));
    }

    #[test]
    fn what_can_be_misread_has_no_origin() {
        for bad in [
            "https://hub.example@evil",
            "https://user:password@hub.example",
            "https://@hub.example",
            "https://hub.example:443@evil:1/",
            "https://hub.example:99999",
            "https://hub.example:+443",
            "https://:443",
            "ftp://hub.example",
            "file:///etc/passwd",
            "/path",
            "hub.example",
        ] {
            assert!(origin(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn redirects_are_read_as_browsers_read_them() {
        let from: Uri = "https://hub.example:8443/a/b?c=d".parse().unwrap();
        for (location, expected) in [
            ("https://cdn.example/x", "https://cdn.example/x"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("/x/y", "https://hub.example:8443/x/y"),
            ("x", "https://hub.example:8443/a/x"),
            ("?e=f", "https://hub.example:8443/a/b?e=f"),
            ("x/y:z", "https://hub.example:8443/a/x/y:z"),
        ] {
            let next = redirected(&from, location).map(|next| next.to_string());
            assert_eq!(next.as_deref(), Ok(expected), "{location}");
        }
        for bad in [
            "http://hub.example:8443/x",
            "http://cdn.example",
            "https://user@cdn.example/x",
            "//hub.example:8443@cdn.example/x",
            "ftp://cdn.example/x",
            "javascript:x",
            "https://",
            "https://cdn example/",
            "\\\\cdn.example/x y",
        ] {
            assert!(redirected(&from, bad).is_err(), "{bad}");
        }
        // The other way is no harm.
        let from: Uri = "http://hub.example/a".parse().unwrap();
        assert!(redirected(&from, "https://hub.example/a").is_ok());
    }
}
