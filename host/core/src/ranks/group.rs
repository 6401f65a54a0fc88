//! The ranks of a world in talk with each other.
//!
//! Rank 0 has a connection with every other rank and passes on what each tells, so that all know the same
//! and come to the same end. A thread for each connection reads, and so finds out when a process ends.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::message::{Kind, Message, Step, devices_bytes, devices_of, digest_bytes, digest_of};
use super::rendezvous::{self, GRACE, Met};
use super::{Digest, Failure, PlanDigest, RankError, Rendezvous, World};
use crate::cancel::CancelToken;
use crate::device::DeviceInfo;
use crate::status::Status;

/// How ranks meet, and for how long they wait for each other.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct JoinOptions {
    /// For how long ranks that do not come or say nothing are waited for: until all have come, and in every
    /// step before loading. For loading there is no limit.
    pub timeout: Duration,
    /// Looked at while waiting.
    pub cancel: CancelToken,
}

impl Default for JoinOptions {
    fn default() -> JoinOptions {
        JoinOptions {
            timeout: Duration::from_secs(60),
            cancel: CancelToken::new(),
        }
    }
}

tightfit_common::setters!([] JoinOptions:
    with_timeout: timeout, Duration;
    with_cancel: cancel, CancelToken;
);

/// The longest that anybody is waited for: a clock cannot count to any number.
const MOST_TIMEOUT: Duration = Duration::from_secs(30 * 86_400);
/// How often it is looked whether to stop.
const LOOK: Duration = Duration::from_millis(20);
/// How long the end waits for what is under way.
const FAREWELL: Duration = Duration::from_secs(2);

/// The ranks of a world, which take every step together: [`Group::devices`], [`Group::agree`],
/// [`Group::reserved`], [`Group::loaded`], in this order, each once.
///
/// In each step every rank tells something, or why it cannot go on; the step ends with what all have told,
/// or, on all of them, with the same [`RankError`]. When a process ends early, or fails while it loads, the
/// others are told at once: see [`Group::cancel_on_loss`]. Dropping a group leaves it.
#[derive(Debug)]
pub struct Group {
    shared: Arc<Shared>,
    turned_away: u64,
}

#[derive(Debug)]
struct Shared {
    rank: u32,
    size: u32,
    options: JoinOptions,
    /// To write to, by rank. Others than rank 0 have only that with rank 0.
    links: Vec<Option<Mutex<TcpStream>>>,
    /// Held while rank 0 tells all others something.
    speaking: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

type Told = Result<Vec<u8>, Failure>;

#[derive(Debug)]
struct State {
    /// For each step what each rank has told.
    told: [Vec<Option<Told>>; Step::ALL.len()],
    /// What has put an end to it.
    trouble: Option<RankError>,
    /// Whether rank 0 has not told all others of it yet.
    is_news: bool,
    /// Used when there is trouble.
    tokens: Vec<CancelToken>,
    /// Threads that read.
    readers: usize,
    /// Whether connections may end now.
    over: bool,
}

impl Group {
    /// Meets the other ranks of `world` at `address`, where rank 0 listens.
    ///
    /// Whoever else connects there is turned away: what is no rank of such a world with the same version of
    /// this crate, or comes as a rank that is there already.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn join(
        world: &World,
        address: &Rendezvous,
        options: &JoinOptions,
    ) -> Result<Group, RankError> {
        let options = limited(options);
        if world.rank > 0 {
            let stream = rendezvous::connect(world, address, &options)?;
            let met = Met {
                links: vec![Some(stream)],
                turned_away: 0,
            };
            return Group::of(world, met, options);
        }
        let listener = rendezvous::listen(address, world);
        let listener = listener.map_err(|error| RankError::CannotListen {
            address: address.to_string(),
            reason: error.to_string(),
        })?;
        Group::host(world, &listener, address, &options)
    }

    /// Meets the others as rank 0, which listens already.
    pub(super) fn host(
        world: &World,
        listener: &TcpListener,
        address: &Rendezvous,
        options: &JoinOptions,
    ) -> Result<Group, RankError> {
        let options = limited(options);
        let met = rendezvous::gather(listener, address, world.size, &options)?;
        Group::of(world, met, options)
    }

    fn of(world: &World, met: Met, options: JoinOptions) -> Result<Group, RankError> {
        let no_thread = |error: std::io::Error| RankError::NoThread {
            reason: error.to_string(),
        };
        let mut streams = Vec::new();
        for (rank, stream) in met.links.iter().enumerate() {
            if let Some(stream) = stream {
                streams.push((rank as u32, stream.try_clone().map_err(no_thread)?));
            }
        }
        let links = met.links.into_iter().map(|link| link.map(Mutex::new));
        let nothing = || (0..world.size).map(|_| None).collect();
        let shared = Arc::new(Shared {
            rank: world.rank,
            size: world.size,
            options,
            links: links.collect(),
            speaking: Mutex::new(()),
            state: Mutex::new(State {
                told: Step::ALL.map(|_| nothing()),
                trouble: None,
                is_news: false,
                tokens: Vec::new(),
                readers: 0,
                over: false,
            }),
            changed: Condvar::new(),
        });
        // From here on leaving it is orderly, whatever happens.
        let group = Group {
            shared,
            turned_away: met.turned_away,
        };
        for (rank, stream) in streams {
            let shared = Arc::clone(&group.shared);
            group.shared.state().readers += 1;
            let reader = std::thread::Builder::new()
                .name("tightfit-rank".to_owned())
                .stack_size(256 << 10)
                .spawn(move || shared.read(rank, stream));
            if let Err(error) = reader {
                group.shared.state().readers -= 1;
                return Err(no_thread(error));
            }
        }
        Ok(group)
    }

    /// Connections to rank 0 that were of no rank. Other ranks know of none.
    pub fn turned_away(&self) -> u64 {
        self.turned_away
    }

    /// Uses `token` as soon as it is known that not all will have loaded their shares: when the process of a
    /// rank ends, or when it fails while loading. Then [`Group::trouble`] says why.
    pub fn cancel_on_loss(&self, token: &CancelToken) {
        let mut state = self.shared.state();
        if state.trouble.is_some() {
            token.cancel();
        }
        state.tokens.push(token.clone());
    }

    /// Why not all can go on, where that is known.
    pub fn trouble(&self) -> Option<RankError> {
        self.shared.state().trouble.clone()
    }

    /// Tells what devices this rank has, or why it has none, and gives those of all ranks.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn devices(
        &self,
        own: Result<&[DeviceInfo], Failure>,
    ) -> Result<Vec<Vec<DeviceInfo>>, RankError> {
        let own = own.and_then(|devices| {
            devices_bytes(devices).map_err(|error| Failure::new(Status::Usage, &error))
        });
        let told = self.shared.exchange(Step::Devices, own)?;
        each(&told, devices_of)
    }

    /// Tells the digest of this rank's plan, or why it has none, and finds out whether all have the same.
    ///
    /// # Errors
    /// [`RankError::OtherFiles`], [`RankError::OtherDevices`], [`RankError::OtherPlan`], and any other
    /// [`RankError`].
    pub fn agree(&self, own: Result<&PlanDigest, Failure>) -> Result<(), RankError> {
        let told = self.shared.exchange(Step::Plan, own.map(digest_bytes))?;
        let told = each(&told, digest_of)?;
        let Some((first, others)) = told.split_first() else {
            return Ok(());
        };
        let differs = |rank: usize, of: fn(&PlanDigest) -> Digest| {
            let (first, other) = (of(first), of(&others[rank]));
            (first != other).then(|| (rank as u32 + 1, first.short(), other.short()))
        };
        for at in 0..others.len() {
            if let Some((rank, first, other)) = differs(at, |digest| digest.checkpoint) {
                return Err(RankError::OtherFiles { rank, first, other });
            }
            if let Some((rank, first, other)) = differs(at, |digest| digest.devices) {
                return Err(RankError::OtherDevices { rank, first, other });
            }
            if let Some((rank, first, other)) = differs(at, |digest| digest.whole) {
                return Err(RankError::OtherPlan { rank, first, other });
            }
        }
        Ok(())
    }

    /// Tells that this rank has taken the memory of its share, or why not, and waits until all have. After an
    /// error it is to be given back.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn reserved(&self, own: Result<(), Failure>) -> Result<(), RankError> {
        let own = own.map(|()| Vec::new());
        self.shared.exchange(Step::Reserve, own).map(|_| ())
    }

    /// Tells that this rank has loaded its share, or why not, and waits until all have, however long that
    /// takes.
    ///
    /// # Errors
    /// [`RankError`].
    pub fn loaded(&self, own: Result<(), Failure>) -> Result<(), RankError> {
        let own = own.map(|()| Vec::new());
        self.shared.exchange(Step::Load, own).map(|_| ())
    }
}

/// Reads what every rank has told; all of them come to the same.
fn each<T>(
    told: &[Vec<u8>],
    read: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<Vec<T>, RankError> {
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        read(bytes).map_err(|reason| RankError::Nonsense {
            rank: rank as u32,
            reason,
        })
    };
    told.iter().enumerate().map(read).collect()
}

fn limited(options: &JoinOptions) -> JoinOptions {
    JoinOptions {
        timeout: options.timeout.min(MOST_TIMEOUT),
        cancel: options.cancel.clone(),
    }
}

impl Drop for Group {
    /// What was told before is heard by the others.
    fn drop(&mut self) {
        let shared = &self.shared;
        let until = Instant::now() + FAREWELL;
        shared.wait_until(until, |state| !state.is_news).over = true;
        shared.end_connections(Shutdown::Write);
        drop(shared.wait_until(until, |state| state.readers == 0));
        shared.end_connections(Shutdown::Both);
    }
}

impl State {
    /// When all have loaded, whoever leaves is no loss.
    fn settle(&mut self) {
        self.over |= self.told[Step::Load.index()]
            .iter()
            .all(|told| matches!(told, Some(Ok(_))));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until something holds, at most so long.
    fn wait_until(&self, until: Instant, holds: fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.state();
        while !holds(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.wait(state, left);
        }
        state
    }

    fn end_connections(&self, how: Shutdown) {
        for link in self.links.iter().flatten() {
            let stream = link.lock().unwrap_or_else(PoisonError::into_inner);
            // It may have ended by itself.
            let _ = stream.shutdown(how);
        }
    }

    /// Writes to one rank. Gives whether it takes anything.
    fn write(&self, to: u32, bytes: &[u8]) -> bool {
        let Some(Some(link)) = self.links.get(to as usize) else {
            return true;
        };
        let mut stream = link.lock().unwrap_or_else(PoisonError::into_inner);
        std::io::Write::write_all(&mut *stream, bytes).is_ok()
    }

    /// Tells rank 0.
    fn send(&self, message: &Message) {
        if !self.write(0, &message.bytes()) {
            self.end(RankError::Lost { rank: 0 }, None);
        }
    }

    /// Tells all other ranks as rank 0: each message but those that are about itself. What is told at once
    /// is not interrupted: a rank that has heard all may leave, and that is no news before all have.
    fn broadcast(&self, messages: &[Message]) {
        let mut lost = None;
        {
            let _alone = self.speaking.lock().unwrap_or_else(PoisonError::into_inner);
            for message in messages {
                let bytes = message.bytes();
                let others = (0..self.size).filter(|&rank| rank != message.rank);
                for rank in others {
                    if !self.write(rank, &bytes) {
                        lost.get_or_insert(rank);
                    }
                }
            }
        }
        if let Some(rank) = lost {
            self.end(RankError::Lost { rank }, None);
        }
    }

    /// Notes what puts an end to it, the first time, and has the others told, where this is rank 0.
    fn end(&self, trouble: RankError, message: Option<Message>) {
        {
            let mut state = self.state();
            if state.over || state.trouble.is_some() {
                return;
            }
            state.trouble = Some(trouble.clone());
            state.tokens.iter().for_each(CancelToken::cancel);
            state.is_news = self.rank == 0;
        }
        self.changed.notify_all();
        if self.rank > 0 {
            return;
        }
        let message = match (message, &trouble) {
            (Some(message), _) => message,
            (None, RankError::Lost { rank }) => Message::of(Kind::Lost, *rank),
            (None, RankError::Late { rank, .. }) => Message::of(Kind::Late, *rank),
            (None, _) => Message::of(Kind::Lost, self.rank),
        };
        self.broadcast(&[message]);
        self.state().is_news = false;
        self.changed.notify_all();
    }

    /// A rank cannot go on, whatever step others are at.
    fn fail(&self, rank: u32, failure: Failure) {
        let message = Message::told(Step::Load, rank, &Err(failure.clone()));
        self.end(RankError::Failed { rank, failure }, Some(message));
    }

    /// Reads what comes from `from` until there is no more.
    fn read(&self, from: u32, mut stream: TcpStream) {
        loop {
            match Message::read(&mut stream) {
                Ok(message) => match self.take(from, message) {
                    Ok(()) => {}
                    Err(reason) => {
                        self.nonsense(from, reason);
                        break;
                    }
                },
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    self.nonsense(from, &error.to_string());
                    break;
                }
                Err(_) => {
                    self.end(RankError::Lost { rank: from }, None);
                    break;
                }
            }
        }
        self.state().readers -= 1;
        self.changed.notify_all();
    }

    fn nonsense(&self, rank: u32, reason: &str) {
        let sentence = format!("it has sent what makes no sense: {reason}");
        self.fail(rank, Failure::new(Status::Device, &sentence));
    }

    /// Takes a message in.
    fn take(&self, from: u32, message: Message) -> Result<(), &'static str> {
        let about = message.rank;
        let is_known = match self.rank {
            0 => about == from,
            own => about < self.size && about != own,
        };
        if !is_known {
            return Err("a message about a rank that it knows nothing of");
        }
        match message.kind {
            Kind::Told | Kind::Failed => {
                let step = message.step;
                let told = message.into_told()?;
                if let (Step::Load, Err(failure)) = (step, &told) {
                    self.fail(about, failure.clone());
                    return Ok(());
                }
                let mut state = self.state();
                let place = &mut state.told[step.index()][about as usize];
                if place.is_some() {
                    return Err("the same again");
                }
                *place = Some(told);
                state.settle();
                drop(state);
                self.changed.notify_all();
                Ok(())
            }
            Kind::Lost if self.rank > 0 => {
                self.end(RankError::Lost { rank: about }, None);
                Ok(())
            }
            Kind::Late if self.rank > 0 => {
                self.end(self.late(about), None);
                Ok(())
            }
            _ => Err("a message that only rank 0 sends, and not now"),
        }
    }

    fn late(&self, rank: u32) -> RankError {
        RankError::Late {
            rank,
            seconds: self.options.timeout.as_secs(),
        }
    }

    /// Tells the others, and gives what all have told.
    fn exchange(&self, step: Step, own: Told) -> Result<Vec<Vec<u8>>, RankError> {
        let index = step.index();
        {
            let mut state = self.state();
            if let Some(trouble) = &state.trouble {
                return Err(trouble.clone());
            }
            state.told[index][self.rank as usize] = Some(own.clone());
            state.settle();
        }
        let message = Message::told(step, self.rank, &own);
        if let (Step::Load, Err(failure)) = (step, &own) {
            // The others need not wait for anybody.
            if self.rank > 0 {
                self.send(&message);
            }
            self.fail(self.rank, failure.clone());
            return Err(self.state().trouble.clone().unwrap_or(RankError::Cancelled));
        }
        if self.rank > 0 {
            self.send(&message);
        }
        let told = self.wait_for_all(step)?;
        if self.rank == 0 {
            let messages = told.iter().enumerate();
            let messages: Vec<Message> = messages
                .map(|(rank, told)| Message::told(step, rank as u32, told))
                .collect();
            self.broadcast(&messages);
        }
        judge(told)
    }

    /// Waits until all ranks have told something in this step.
    fn wait_for_all(&self, step: Step) -> Result<Vec<Told>, RankError> {
        let timeout = match self.rank {
            0 => self.options.timeout,
            // Rank 0 says who is late, and may itself have come last.
            _ => 2 * self.options.timeout + GRACE,
        };
        let until = (step != Step::Load).then(|| Instant::now() + timeout);
        let mut state = self.state();
        loop {
            // What is complete stays so, whatever happens afterwards.
            let told = &state.told[step.index()];
            if let Some(all) = told.iter().cloned().collect::<Option<Vec<Told>>>() {
                return Ok(all);
            }
            if let Some(trouble) = &state.trouble {
                return Err(trouble.clone());
            }
            if self.options.cancel.is_cancelled() {
                return Err(RankError::Cancelled);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                let missing = told.iter().position(Option::is_none).unwrap_or(0);
                let late = self.late(if self.rank == 0 { missing as u32 } else { 0 });
                drop(state);
                self.end(late.clone(), None);
                return Err(late);
            }
            state = self.wait(state, LOOK);
        }
    }
}

/// What all have told, or the reason of one that cannot go on.
fn judge(told: Vec<Told>) -> Result<Vec<Vec<u8>>, RankError> {
    let first = told.iter().enumerate();
    let first = first
        .filter_map(|(rank, told)| Some((rank, told.as_ref().err()?)))
        .next();
    let Some((rank, failure)) = first else {
        return Ok(told.into_iter().flatten().collect());
    };
    let failure = failure.clone();
    let is_same = |told: &Told| told.as_ref().err() == Some(&failure);
    Err(match told.iter().all(is_same) {
        true => RankError::AllFailed { failure },
        false => RankError::Failed {
            rank: rank as u32,
            failure,
        },
    })
}
