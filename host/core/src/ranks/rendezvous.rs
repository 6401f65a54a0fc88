//! How ranks meet: rank 0 listens, the others come, and whoever else does is turned away.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::message::{
    ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Kind, Message, absent_bytes, absent_of,
};
use super::{JoinOptions, RankError, Rendezvous, World};

/// Whoever has connected has so long to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// Most connections that have not said who they are; of more the oldest are turned away.
const MOST_UNKNOWN: usize = 256;
/// Between two looks at who has come.
const PAUSE: Duration = Duration::from_millis(5);
/// How long one address is tried at a time.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a port may still be in use when rank 0 begins: by whoever looks for it there.
const IN_USE: Duration = Duration::from_secs(3);
/// After so long a message that nobody takes is given up.
const WRITE: Duration = Duration::from_secs(10);
/// How much later than rank 0 others give up.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// Connections with the other ranks.
#[derive(Debug)]
pub(super) struct Met {
    /// By rank; of ranks other than 0 only that with rank 0.
    pub(super) links: Vec<Option<TcpStream>>,
    /// Connections that were none of theirs.
    pub(super) turned_away: u64,
}

/// Listens where the ranks meet: at this address if it is one, and else at that of the name, or at all of
/// this machine, where it has no such address or the name leads back to it.
///
/// # Errors
/// What the system says.
pub(super) fn listen(address: &Rendezvous, world: &World) -> io::Result<TcpListener> {
    let until = Instant::now() + IN_USE;
    loop {
        match bind(address, world) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(20 * PAUSE);
            }
            other => return other,
        }
    }
}

fn bind(address: &Rendezvous, world: &World) -> io::Result<TcpListener> {
    let (host, port) = (address.host.as_str(), address.port);
    if host.parse::<IpAddr>().is_ok() || host == "localhost" || world.local_size == world.size {
        return TcpListener::bind((host, port));
    }
    let known: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()?
        .filter(|address| !address.ip().is_loopback())
        .collect();
    match TcpListener::bind(&known[..]) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            tracing::info!("rank 0 has no address of '{host}' and listens at all that it has");
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        }
        other => other,
    }
}

/// Somebody who has not said everything yet.
struct Unknown {
    stream: TcpStream,
    said: [u8; HELLO_BYTES],
    have: usize,
    until: Instant,
}

/// What is to be done with one of them.
enum Heard {
    Nothing,
    Hello(Hello),
    Nonsense,
}

impl Unknown {
    fn hear(&mut self) -> Heard {
        while self.have < HELLO_BYTES {
            match self.stream.read(&mut self.said[self.have..]) {
                Ok(0) => return Heard::Nonsense,
                Ok(more) => {
                    self.have += more;
                    if !Hello::may_begin_with(&self.said[..self.have]) {
                        return Heard::Nonsense;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return match Instant::now() < self.until {
                        true => Heard::Nothing,
                        false => Heard::Nonsense,
                    };
                }
                Err(_) => return Heard::Nonsense,
            }
        }
        Hello::read(&self.said).map_or(Heard::Nonsense, Heard::Hello)
    }
}

/// Waits as rank 0 until all ranks have come.
///
/// # Errors
/// [`RankError::Absent`], which those that have come are told too, and [`RankError::Cancelled`].
pub(super) fn gather(
    listener: &TcpListener,
    address: &Rendezvous,
    size: u32,
    options: &JoinOptions,
) -> Result<Met, RankError> {
    let cannot_listen = |error: io::Error| RankError::CannotListen {
        address: address.to_string(),
        reason: error.to_string(),
    };
    listener.set_nonblocking(true).map_err(cannot_listen)?;
    let until = Instant::now() + options.timeout;
    let mut unknown: VecDeque<Unknown> = VecDeque::new();
    let mut links: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
    let mut turned_away = 0;
    loop {
        if options.cancel.is_cancelled() {
            return Err(RankError::Cancelled);
        }
        // However many come, those that are here are heard in between.
        for _ in 0..MOST_UNKNOWN {
            // Errors are of connections that are gone, or pass.
            let Ok((stream, _)) = listener.accept() else {
                break;
            };
            if stream.set_nonblocking(true).is_err() {
                turned_away += 1;
                continue;
            }
            unknown.push_back(Unknown {
                stream,
                said: [0; HELLO_BYTES],
                have: 0,
                until: Instant::now() + INTRODUCTION,
            });
        }
        let mut waiting = VecDeque::with_capacity(unknown.len());
        for mut one in unknown.drain(..) {
            match one.hear() {
                Heard::Nothing => waiting.push_back(one),
                Heard::Nonsense => turned_away += 1,
                Heard::Hello(hello) => {
                    let seat = links.get_mut(hello.rank as usize);
                    let answer = match (hello.judge(size), &seat) {
                        (Answer::Welcome, Some(Some(_))) => Answer::Taken,
                        (answer, _) => answer,
                    };
                    // It is short enough for the buffer of a new connection.
                    let told = one.stream.write_all(&answer.bytes());
                    match (answer, seat, told) {
                        (Answer::Welcome, Some(seat), Ok(())) => *seat = Some(one.stream),
                        _ => turned_away += 1,
                    }
                }
            }
        }
        while waiting.len() > MOST_UNKNOWN {
            waiting.pop_front();
            turned_away += 1;
        }
        unknown = waiting;
        for seat in &mut links {
            if seat.as_ref().is_some_and(|stream| !is_open(stream)) {
                *seat = None;
                turned_away += 1;
            }
        }
        if links[1..].iter().all(Option::is_some) {
            break;
        }
        if Instant::now() >= until {
            turned_away += unknown.len() as u64;
            return Err(absent(links, address, options, turned_away));
        }
        std::thread::sleep(PAUSE);
    }
    turned_away += unknown.len() as u64;
    for stream in links.iter_mut().flatten() {
        // One that is gone again is noticed by whoever reads from it.
        let _ = settle(stream);
        let _ = stream.write_all(&Message::of(Kind::Begin, 0).bytes());
    }
    Ok(Met { links, turned_away })
}

/// Tells those that have come that others have not.
fn absent(
    links: Vec<Option<TcpStream>>,
    address: &Rendezvous,
    options: &JoinOptions,
    turned_away: u64,
) -> RankError {
    let ranks = (1..links.len() as u32).filter(|&rank| links[rank as usize].is_none());
    let ranks: Vec<u32> = ranks.collect();
    let message = Message {
        payload: absent_bytes(turned_away, &ranks),
        ..Message::of(Kind::Absent, 0)
    };
    for mut stream in links.into_iter().flatten() {
        let _ = stream.write_all(&message.bytes());
    }
    RankError::Absent {
        ranks,
        address: address.to_string(),
        seconds: options.timeout.as_secs(),
        turned_away,
    }
}

/// Whether a connection, which must not block, is still there.
fn is_open(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]) {
        Ok(bytes) => bytes > 0,
        Err(error) => {
            matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            )
        }
    }
}

/// Readies a connection for messages: reads wait, writes not for ever, and the system finds out when the
/// other machine is gone.
fn settle(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(Some(WRITE))?;
    // Messages are short and waited for.
    stream.set_nodelay(true)?;
    keep_alive(stream)
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    Ok(sockopt::set_tcp_keepcnt(stream, 4)?)
}

/// A process that ends is noticed all the same; a machine that does not answer any more is not.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn keep_alive(_: &TcpStream) -> io::Result<()> {
    Ok(())
}

/// Why a try to join was in vain.
enum Try {
    Again(String),
    Never(RankError),
}

/// Comes to rank 0 as another rank, and waits until all have.
///
/// # Errors
/// [`RankError::Unreachable`], [`RankError::NotLetIn`], [`RankError::Absent`], [`RankError::Lost`] and
/// [`RankError::Cancelled`].
pub(super) fn connect(
    world: &World,
    address: &Rendezvous,
    options: &JoinOptions,
) -> Result<TcpStream, RankError> {
    let until = Instant::now() + options.timeout;
    let mut pause = 4 * PAUSE;
    loop {
        if options.cancel.is_cancelled() {
            return Err(RankError::Cancelled);
        }
        let reason = match introduce(world, address, until, options) {
            Ok(stream) => return wait_for_others(stream, address, until, options),
            Err(Try::Never(error)) => return Err(error),
            Err(Try::Again(reason)) => reason,
        };
        if Instant::now() + pause >= until {
            return Err(RankError::Unreachable {
                address: address.to_string(),
                seconds: options.timeout.as_secs(),
                reason,
            });
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(40 * PAUSE);
    }
}

/// One try to be let in.
fn introduce(
    world: &World,
    address: &Rendezvous,
    until: Instant,
    options: &JoinOptions,
) -> Result<TcpStream, Try> {
    let again = |error: io::Error| Try::Again(error.to_string());
    let left = until.saturating_duration_since(Instant::now());
    let left = left.clamp(PAUSE, CONNECT);
    let mut failure = Try::Again("the name has no address".to_owned());
    let addresses = (address.host.as_str(), address.port).to_socket_addrs();
    let mut connected = None;
    for address in addresses.map_err(again)? {
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                connected = Some(stream);
                break;
            }
            Err(error) => failure = again(error),
        }
    }
    let Some(mut stream) = connected else {
        return Err(failure);
    };
    // On one machine a connection can meet itself where nobody listens, and would keep the port from who will.
    let ends = (stream.local_addr(), stream.peer_addr());
    if matches!(ends, (Ok(own), Ok(other)) if own == other) {
        return Err(Try::Again("nobody listens there".to_owned()));
    }
    stream
        .set_write_timeout(Some(INTRODUCTION))
        .map_err(again)?;
    stream
        .write_all(&Hello::new(world.size, world.rank).bytes())
        .map_err(again)?;
    let mut answer = [0; ANSWER_BYTES];
    let patience = Instant::now() + INTRODUCTION;
    let heard =
        read_until(&mut stream, &mut answer, patience, options).map_err(|error| {
            match error.kind() {
                io::ErrorKind::TimedOut => {
                    Try::Again("whoever listens there does not answer".to_owned())
                }
                io::ErrorKind::Interrupted => Try::Never(RankError::Cancelled),
                _ => Try::Again(format!(
                    "whoever listens there ended the connection ({error})"
                )),
            }
        });
    heard?;
    match Answer::read(&answer) {
        Some(Answer::Welcome) => Ok(stream),
        // That other process may be one that is about to end.
        Some(Answer::Taken) => Err(Try::Again(Answer::Taken.reason().to_owned())),
        Some(answer) => Err(Try::Never(RankError::NotLetIn {
            address: address.to_string(),
            rank: world.rank,
            reason: answer.reason(),
        })),
        None => Err(Try::Again("whoever listens there is not rank 0".to_owned())),
    }
}

/// Waits until rank 0 says that all have come.
fn wait_for_others(
    mut stream: TcpStream,
    address: &Rendezvous,
    until: Instant,
    options: &JoinOptions,
) -> Result<TcpStream, RankError> {
    // Rank 0 may have begun to wait later.
    let until = until + options.timeout + GRACE;
    let mut reading = Reading {
        stream: &mut stream,
        until,
        options,
    };
    let message = Message::read(&mut reading).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => RankError::Late {
            rank: 0,
            seconds: options.timeout.as_secs(),
        },
        _ if options.cancel.is_cancelled() => RankError::Cancelled,
        _ => RankError::Lost { rank: 0 },
    })?;
    match message.kind {
        Kind::Begin => {
            let _ = settle(&stream);
            Ok(stream)
        }
        Kind::Absent if absent_of(&message.payload).is_some() => {
            let (turned_away, ranks) = absent_of(&message.payload).unwrap_or_default();
            Err(RankError::Absent {
                ranks,
                address: address.to_string(),
                seconds: options.timeout.as_secs(),
                turned_away,
            })
        }
        _ => Err(RankError::Nonsense {
            rank: 0,
            reason: "neither that all have come nor who has not".to_owned(),
        }),
    }
}

/// Reads until a point in time.
struct Reading<'a> {
    stream: &'a mut TcpStream,
    until: Instant,
    options: &'a JoinOptions,
}

impl Read for Reading<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.options.cancel.is_cancelled() {
                // Not `Interrupted`: that is tried again by whoever reads all.
                return Err(io::Error::other("cancelled"));
            }
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left.min(20 * PAUSE)))?;
            match self.stream.read(out) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) => {}
                other => return other,
            }
        }
    }
}

fn read_until(
    stream: &mut TcpStream,
    out: &mut [u8],
    until: Instant,
    options: &JoinOptions,
) -> io::Result<()> {
    let mut reading = Reading {
        stream,
        until,
        options,
    };
    reading.read_exact(out)
}
