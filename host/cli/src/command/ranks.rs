//! Several processes that load one model together: who this is, and how all come to one plan.

use std::time::Duration;

use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, DeviceInfo, RankedDevice, RankedSpec, WorldDevices};
use tightfit::load::{LoadError, Reserved, ReservedPlan};
use tightfit::model::Model;
use tightfit::plan::{Plan, Proposed};
use tightfit::ranks::{Failure, Given, Group, JoinOptions, PlanDigest, RankError, World};
use tightfit::report::{RanksReport, Report};

use crate::command::args::{RankOptions, RankedPlacementOptions};
use crate::command::error::CommandError;
use crate::command::session;

/// Which of how many processes this is.
pub(crate) enum Place {
    /// The only one.
    Alone,
    /// None: it plans for so many.
    Outside(u32),
    /// One of several.
    Rank(World),
}

impl Place {
    /// What is given comes first, then what the environment says. Only who plans can be none of them.
    pub(crate) fn of(options: &RankOptions, may_be_outside: bool) -> Result<Place, CommandError> {
        let given = Given {
            rank: options.rank,
            size: options.world,
            rendezvous: options.rendezvous.clone(),
        };
        if let (true, None, Some(size @ 2..)) = (may_be_outside, options.rank, options.world) {
            // As a rank, so that it is one of those that can be.
            let given = Given {
                rank: Some(0),
                ..given
            };
            World::from_variables(&given, |_| None)?;
            return Ok(Place::Outside(size));
        }
        Ok(World::from_process(&given)?.map_or(Place::Alone, Place::Rank))
    }
}

/// Refuses a plan that is not the one asked for, if one was.
pub(crate) fn check_plan(
    options: &RankOptions,
    checkpoint: &Checkpoint,
    plan: &Plan,
) -> Result<(), RankError> {
    match options.digest {
        Some(_) => check_digest(options, &PlanDigest::of(checkpoint, plan)),
        None => Ok(()),
    }
}

fn check_digest(options: &RankOptions, digest: &PlanDigest) -> Result<(), RankError> {
    match options.digest {
        Some(need) if need != digest.whole => Err(RankError::NotTheDigest {
            need,
            have: digest.whole,
        }),
        _ => Ok(()),
    }
}

/// What all ranks have come to, as far as nobody has taken any memory.
pub(crate) struct Agreed {
    world: World,
    /// The others, where they are asked.
    group: Option<Group>,
    pub(crate) checkpoint: Checkpoint,
    /// This rank's devices, where they were opened.
    devices: Vec<Box<dyn Device>>,
    /// The plan of all.
    proposed: Proposed,
    digest: PlanDigest,
    /// This rank's part of it.
    share: Plan,
}

/// What a rank opens.
pub(crate) type Opened = (Checkpoint, Vec<Box<dyn Device>>);

impl Agreed {
    /// Comes to a plan with the other ranks, or, where `meet` says so, without asking them. `open` opens
    /// the checkpoint and this rank's devices.
    pub(crate) fn upon(
        world: World,
        meet: bool,
        options: &RankedPlacementOptions,
        open: impl FnOnce(&World, &WorldDevices) -> Result<Opened, CommandError>,
        cancel: &CancelToken,
    ) -> Result<Agreed, CommandError> {
        let specs = WorldDevices::new(&options.devices, world.size)?;
        let keep = specs.is_of(world.rank);
        let group = match &world.rendezvous {
            Some(address) if meet => {
                let join = JoinOptions::default()
                    .with_timeout(Duration::from_secs(options.ranks.rendezvous_timeout))
                    .with_cancel(cancel.clone());
                let group = Group::join(&world, address, &join)?;
                // Whatever this rank is at, it is for nothing when another has ended.
                group.cancel_on_loss(cancel);
                Some(group)
            }
            _ => None,
        };
        let plan = |opened: &Opened, devices: Vec<RankedDevice>| {
            let devices: Vec<DeviceInfo> = devices.into_iter().map(|device| device.info).collect();
            let (checkpoint, _) = opened;
            let proposed = session::propose_with(&options.policy, checkpoint, &devices, cancel)?;
            let digest = PlanDigest::of(checkpoint, &proposed.plan);
            check_digest(&options.ranks, &digest)?;
            Ok((proposed, digest))
        };
        let (opened, (proposed, digest)) = match &group {
            None => {
                // Whether it is known what the others have is known before anything is opened.
                let devices = specs.planned()?;
                let opened = open(&world, &specs)?;
                let planned: Result<_, CommandError> = plan(&opened, devices);
                (opened, planned?)
            }
            Some(group) => {
                let opened = open(&world, &specs).map(|opened| (session::infos(&opened.1), opened));
                let ((_, opened), told) = together(&world, opened, |own| {
                    group.devices(own.map(|(infos, _)| infos.as_slice()))
                })?;
                let planned = specs.gathered(&told).map_err(CommandError::from);
                let planned = planned.and_then(|devices| plan(&opened, devices));
                let (planned, ()) = together(&world, planned, |own| {
                    group.agree(own.map(|(_, digest)| digest))
                })?;
                (opened, planned)
            }
        };
        let (checkpoint, devices) = opened;
        let share = proposed.plan.share(&keep);
        Ok(Agreed {
            world,
            group,
            checkpoint,
            devices,
            proposed,
            digest,
            share,
        })
    }

    /// What is of this rank, as if it were a plan by itself.
    pub(crate) fn proposed(&self) -> Proposed {
        Proposed {
            plan: self.share.clone(),
            ..self.proposed.clone()
        }
    }

    /// Says in a report of this rank's part whose it is.
    pub(crate) fn report(&self, report: Report) -> Report {
        let ranks = RanksReport {
            rank: Some(self.world.rank),
            world: self.world.size,
            agreed: self.group.is_some(),
            turned_away: self.group.as_ref().map_or(0, Group::turned_away),
        };
        report.with_ranks(ranks, &self.digest)
    }

    /// Takes the memory of this rank's part, once all have theirs, and loads it. When one of the others
    /// cannot load its part, or ends, this is given up too.
    pub(crate) fn load(
        &self,
        carry_out: impl FnOnce(
            ReservedPlan,
            &[Box<dyn Device>],
        ) -> Result<(Model, Report), CommandError>,
    ) -> Result<(Model, Report), CommandError> {
        let reserved = Reserved::take(self.share.clone(), &self.devices)
            .map_err(|error: LoadError| CommandError::from(error));
        let reserved = match &self.group {
            None => reserved?,
            Some(group) => {
                let (reserved, ()) =
                    together(&self.world, reserved, |own| group.reserved(own.map(|_| ())))?;
                reserved
            }
        };
        let placed = ReservedPlan {
            proposed: self.proposed(),
            reserved,
            revisions: Vec::new(),
        };
        let loaded = carry_out(placed, &self.devices);
        let (model, report) = match &self.group {
            None => loaded?,
            Some(group) => {
                let (loaded, ()) =
                    together(&self.world, loaded, |own| group.loaded(own.map(|_| ())))?;
                loaded
            }
        };
        Ok((model, self.report(report)))
    }
}

/// Takes a step with the other ranks: tells them what this one has come to, and gives that with what all
/// have told. An error is that of all; where this rank has caused it, or all have the same, with all that
/// is known of it.
fn together<T, U>(
    world: &World,
    own: Result<T, CommandError>,
    tell: impl FnOnce(Result<&T, Failure>) -> Result<U, RankError>,
) -> Result<(T, U), CommandError> {
    let told = tell(
        own.as_ref()
            .map_err(|error| Failure::new(error.status(), error)),
    );
    match (own, told) {
        (Ok(own), Ok(told)) => Ok((own, told)),
        (Err(own), Ok(_) | Err(RankError::AllFailed { .. })) => Err(own),
        (Err(own), Err(RankError::Failed { rank, .. })) if rank == world.rank => {
            let source = Box::new(own);
            Err(CommandError::OfRank { rank, source })
        }
        (_, Err(error)) => Err(error.into()),
    }
}

/// The devices of the only process that there is.
pub(crate) fn of_one_process(
    options: &RankedPlacementOptions,
) -> Result<Vec<tightfit::device::DeviceSpec>, CommandError> {
    Ok(RankedSpec::of_one_process(&options.devices)?)
}
