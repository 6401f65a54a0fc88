//! Which rank of how many this process is, as its launcher says.

use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

use crate::status::Status;

/// Most ranks of a world.
pub const MAX_WORLD: u32 = 1024;

/// One process among several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// Which it is, from 0.
    pub rank: u32,
    /// How many there are.
    pub size: u32,
    /// Which it is among those of its machine, from 0.
    pub local_rank: u32,
    /// How many there are on its machine; all, where nobody says.
    pub local_size: u32,
    /// Where they meet, where that is known.
    pub rendezvous: Option<Rendezvous>,
}

/// What a user says, which comes before what the environment does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    /// [`World::rank`].
    pub rank: Option<u32>,
    /// [`World::size`]; 1 stands for a process by itself, whatever the environment says.
    pub size: Option<u32>,
    /// [`World::rendezvous`].
    pub rendezvous: Option<Rendezvous>,
}

/// An address at which ranks meet: rank 0 listens there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// A name or an address, without brackets.
    pub host: String,
    /// Not 0.
    pub port: u16,
}

impl FromStr for Rendezvous {
    type Err = WorldError;

    /// Reads `HOST:PORT`; an IPv6 address stands in brackets.
    fn from_str(text: &str) -> Result<Rendezvous, WorldError> {
        let error = || WorldError::NotAnAddress {
            text: text.to_owned(),
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let is_host = |host: &str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic());
        let (true, Ok(port @ 1..)) = (is_host(bare.unwrap_or(host)), port.parse()) else {
            return Err(error());
        };
        if bare.is_none() && host.contains([':', '[', ']']) {
            return Err(error());
        }
        Ok(Rendezvous {
            host: bare.unwrap_or(host).to_owned(),
            port,
        })
    }
}

impl fmt::Display for Rendezvous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Why it cannot be said which rank this is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorldError {
    /// Of two variables that belong together one is not set.
    #[error("{set} is set and {missing} is not: set both, or give --rank and --world")]
    HalfSet {
        /// The one that is.
        set: &'static str,
        /// The one that is not.
        missing: &'static str,
    },
    /// A variable that is no number.
    #[error("{variable} is '{value}', which is not a number from {least} to {most}")]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// What it is.
        value: String,
        /// The least it may be.
        least: u32,
        /// The most.
        most: u32,
    },
    /// A rank that there is not.
    #[error("{what} is {rank}, and ranks are counted from 0 to {} ({of} is {size})", size - 1)]
    NoSuchRank {
        /// The variable or option.
        what: &'static str,
        /// What it says.
        rank: u32,
        /// What says how many there are.
        of: &'static str,
        /// How many.
        size: u32,
    },
    /// A rank without a number of ranks.
    #[error("--rank {rank} needs --world, the number of ranks")]
    NoSize {
        /// The rank.
        rank: u32,
    },
    /// A number of ranks that cannot be.
    #[error("--world {size} is not a number from 1 to {MAX_WORLD}")]
    BadSize {
        /// The number.
        size: u32,
    },
    /// A number of ranks, and nobody says which of them this is.
    #[error("--world {size} needs --rank: which of them this is, from 0")]
    NoRank {
        /// The number.
        size: u32,
    },
    /// What is no address of a rendezvous.
    #[error("'{text}' is not an address to meet at: it is HOST:PORT, for example 10.0.0.1:29501")]
    NotAnAddress {
        /// What was given.
        text: String,
    },
}

impl From<&WorldError> for Status {
    fn from(_: &WorldError) -> Status {
        Status::Usage
    }
}

/// The variables that a launcher sets.
struct Launcher {
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    local_size: Option<&'static str>,
}

/// Whoever starts the process itself comes first: torchrun and Open MPI are started within Slurm, too.
/// Ray Train sets torchrun's names.
const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        rank: "RANK",
        size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: Some("LOCAL_WORLD_SIZE"),
    },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: Some("OMPI_COMM_WORLD_LOCAL_SIZE"),
    },
    Launcher {
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: Some("MPI_LOCALNRANKS"),
    },
    Launcher {
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_size: None,
    },
];

/// Slurm's number of a step. A batch script has the other variables too, as if it were the first task,
/// and is by itself; it has no number, or one of these.
const SLURM_STEP: &str = "SLURM_STEP_ID";
/// Numbers from here on are not of steps that `srun` starts.
const SPECIAL_STEPS: u32 = 0xffff_fff0;

impl World {
    /// Returns which rank this process is, by what is given or else by its environment: that of torchrun,
    /// Open MPI, MPICH or Slurm. `None` where there is only one.
    ///
    /// # Errors
    /// [`WorldError`], which names the variable that is wrong.
    pub fn from_process(given: &Given) -> Result<Option<World>, WorldError> {
        World::from_variables(given, |name| std::env::var_os(name))
    }

    /// The same for an environment that is not that of this process.
    ///
    /// # Errors
    /// [`WorldError`], which names the variable that is wrong.
    pub fn from_variables(
        given: &Given,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Option<World>, WorldError> {
        let variables = Variables(&variable);
        let world = match (given.rank, given.size) {
            (None, None) => variables.world()?,
            (Some(rank), None) => return Err(WorldError::NoSize { rank }),
            (_, Some(size)) if size == 0 || size > MAX_WORLD => {
                return Err(WorldError::BadSize { size });
            }
            (None, Some(1)) => None,
            (None, Some(size)) => return Err(WorldError::NoRank { size }),
            (Some(rank), Some(size)) if rank >= size => {
                return Err(WorldError::NoSuchRank {
                    what: "--rank",
                    rank,
                    of: "--world",
                    size,
                });
            }
            (Some(rank), Some(size)) => {
                let [torchrun, ..] = &LAUNCHERS;
                Some(variables.local(torchrun, rank, size)?)
            }
        };
        let Some(mut world) = world.filter(|world| world.size > 1) else {
            return Ok(None);
        };
        world.rendezvous = match &given.rendezvous {
            Some(rendezvous) => Some(rendezvous.clone()),
            None => variables.rendezvous()?,
        };
        Ok(Some(world))
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Variables<'_> {
    /// A variable, where it says something.
    fn text(&self, name: &str) -> Option<String> {
        let value = (self.0)(name)?.to_string_lossy().trim().to_owned();
        (!value.is_empty()).then_some(value)
    }

    fn number(
        &self,
        variable: &'static str,
        least: u32,
        most: u32,
    ) -> Result<Option<u32>, WorldError> {
        let Some(value) = self.text(variable) else {
            return Ok(None);
        };
        let is_number = value.bytes().all(|b| b.is_ascii_digit());
        match value.parse() {
            Ok(number) if is_number && (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(WorldError::NotANumber {
                variable,
                value,
                least,
                most,
            }),
        }
    }

    /// What the first launcher says of which there is anything.
    fn world(&self) -> Result<Option<World>, WorldError> {
        for launcher in &LAUNCHERS {
            if launcher.rank == "SLURM_PROCID" && !self.is_in_a_step() {
                continue;
            }
            let size = self.number(launcher.size, 1, MAX_WORLD)?;
            let rank = self.number(launcher.rank, 0, u32::MAX)?;
            let half = |set, missing| Err(WorldError::HalfSet { set, missing });
            let (rank, size) = match (rank, size) {
                (None, None) => continue,
                (Some(_), None) => return half(launcher.rank, launcher.size),
                // Of one there is nothing to be said.
                (None, Some(1)) => return Ok(None),
                (None, Some(_)) => return half(launcher.size, launcher.rank),
                (Some(rank), Some(size)) => (rank, size),
            };
            if rank >= size {
                return Err(WorldError::NoSuchRank {
                    what: launcher.rank,
                    rank,
                    of: launcher.size,
                    size,
                });
            }
            return Ok(Some(self.local(launcher, rank, size)?));
        }
        Ok(None)
    }

    /// A rank and its place on its machine. Where nobody says, all are on one.
    fn local(&self, launcher: &Launcher, rank: u32, size: u32) -> Result<World, WorldError> {
        let local_size = match launcher.local_size {
            Some(name) => self.number(name, 1, size)?,
            None => None,
        };
        let local_rank = self.number(launcher.local_rank, 0, u32::MAX)?;
        let local_rank = local_rank.unwrap_or(rank % local_size.unwrap_or(size));
        if local_rank >= local_size.unwrap_or(size) {
            return Err(WorldError::NoSuchRank {
                what: launcher.local_rank,
                rank: local_rank,
                of: match (local_size, launcher.local_size) {
                    (Some(_), Some(name)) => name,
                    _ => launcher.size,
                },
                size: local_size.unwrap_or(size),
            });
        }
        Ok(World {
            rank,
            size,
            local_rank,
            local_size: local_size.unwrap_or(size),
            rendezvous: None,
        })
    }

    fn is_in_a_step(&self) -> bool {
        let step = self.text(SLURM_STEP).and_then(|step| step.parse().ok());
        step.is_some_and(|step: u32| step < SPECIAL_STEPS)
    }

    /// The port behind that of torch's own store.
    fn rendezvous(&self) -> Result<Option<Rendezvous>, WorldError> {
        const ADDRESS: &str = "MASTER_ADDR";
        const PORT: &str = "MASTER_PORT";
        let half = |set, missing| Err(WorldError::HalfSet { set, missing });
        let (host, port) = match (self.text(ADDRESS), self.number(PORT, 1, 65534)?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return half(ADDRESS, PORT),
            (None, Some(_)) => return half(PORT, ADDRESS),
            (Some(host), Some(port)) => (host, port as u16 + 1),
        };
        let host = match host.contains(':') && !host.starts_with('[') {
            true => format!("[{host}]"),
            false => host,
        };
        format!("{host}:{port}").parse().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn world(given: Given, variables: &[(&str, &str)]) -> Result<Option<World>, WorldError> {
        World::from_variables(&given, |name| {
            let found = variables.iter().find(|(n, _)| *n == name)?;
            Some(found.1.into())
        })
    }

    fn of(variables: &[(&str, &str)]) -> Result<Option<World>, WorldError> {
        world(Given::default(), variables)
    }

    fn explicit(rank: u32, size: u32) -> Given {
        Given {
            rank: Some(rank),
            size: Some(size),
            rendezvous: None,
        }
    }

    #[test]
    fn launchers_say_which_rank_it_is() {
        let torchrun = of(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29500"),
            // Within Slurm, as its only task.
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
            ("SLURM_STEP_ID", "0"),
        ]);
        let expected = World {
            rank: 5,
            size: 8,
            local_rank: 1,
            local_size: 4,
            rendezvous: Some("node0:29501".parse().unwrap()),
        };
        assert_eq!(torchrun.unwrap(), Some(expected.clone()));
        let open_mpi = of(&[
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ]);
        let quiet = World {
            rendezvous: None,
            ..expected
        };
        assert_eq!(open_mpi.unwrap(), Some(quiet.clone()));
        let mpich = of(&[("PMI_RANK", "5"), ("PMI_SIZE", "8")])
            .unwrap()
            .unwrap();
        assert_eq!((mpich.local_rank, mpich.local_size), (5, 8));
        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "1"),
        ];
        let step = |id| of(&[&slurm[..], &[("SLURM_STEP_ID", id)]].concat());
        let srun = step("0").unwrap().unwrap();
        assert_eq!((srun.rank, srun.size, srun.local_rank), (5, 8, 1));
        // A batch script and an interactive shell are by themselves.
        assert_eq!(of(&slurm), Ok(None));
        for special in ["4294967291", "4294967290", "x"] {
            assert_eq!(step(special), Ok(None), "{special}");
        }
    }

    #[test]
    fn one_process_is_no_world() {
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(None));
        assert_eq!(of(&[("WORLD_SIZE", "1")]), Ok(None));
        assert_eq!(of(&[("RANK", ""), ("WORLD_SIZE", " ")]), Ok(None));
        // By the user's word, whatever the environment says.
        let alone = Given {
            size: Some(1),
            ..Given::default()
        };
        for variables in [&[("RANK", "3"), ("WORLD_SIZE", "4")][..], &[("RANK", "x")]] {
            assert_eq!(world(alone.clone(), variables), Ok(None));
            assert_eq!(world(explicit(0, 1), variables), Ok(None));
        }
    }

    #[test]
    fn the_user_comes_before_the_environment() {
        let variables = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "::1"),
            ("MASTER_PORT", "1"),
        ];
        let told = world(explicit(0, 2), &variables).unwrap().unwrap();
        assert_eq!(
            (told.rank, told.size, told.local_rank, told.local_size),
            (0, 2, 1, 2)
        );
        assert_eq!(told.rendezvous.unwrap().to_string(), "[::1]:2");
        let given = Given {
            rendezvous: Some("h:9".parse().unwrap()),
            ..Given::default()
        };
        let told = world(given, &variables).unwrap().unwrap();
        assert_eq!((told.rank, told.rendezvous.unwrap().port), (3, 9));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases: [(&[(&str, &str)], &str); 12] = [
            (&[("RANK", "1")], "WORLD_SIZE"),
            (&[("WORLD_SIZE", "2")], "RANK"),
            (&[("RANK", "one"), ("WORLD_SIZE", "2")], "RANK is 'one'"),
            (&[("RANK", "-1"), ("WORLD_SIZE", "2")], "RANK is '-1'"),
            (&[("RANK", "+1"), ("WORLD_SIZE", "2")], "RANK is '+1'"),
            (
                &[("RANK", "1"), ("WORLD_SIZE", "2.0")],
                "WORLD_SIZE is '2.0'",
            ),
            (&[("RANK", "0"), ("WORLD_SIZE", "0")], "WORLD_SIZE is '0'"),
            (&[("RANK", "0"), ("WORLD_SIZE", "1025")], "from 1 to 1024"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK is 2"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "2")],
                "LOCAL_RANK is 2",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
                "MASTER_PORT",
            ),
            (
                &[
                    ("RANK", "0"),
                    ("WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "a"),
                    ("MASTER_PORT", "65535"),
                ],
                "MASTER_PORT is '65535'",
            ),
        ];
        for (variables, part) in cases {
            let error = of(variables).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let given = |rank, size| Given {
            rank,
            size,
            rendezvous: None,
        };
        for (given, part) in [
            (given(Some(1), None), "needs --world"),
            (given(None, Some(4)), "needs --rank"),
            (given(Some(4), Some(4)), "--rank is 4"),
            (given(Some(0), Some(0)), "--world 0"),
            (given(Some(0), Some(2000)), "--world 2000"),
        ] {
            let error = world(given, &[]).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for (text, host, port) in [
            ("node-1.example:1", "node-1.example", 1),
            ("127.0.0.1:65535", "127.0.0.1", 65535),
            ("[::1]:80", "::1", 80),
        ] {
            let address: Rendezvous = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port));
            assert_eq!(address.to_string(), text);
        }
        for bad in [
            "", "a", ":1", "a:0", "a:65536", "::1:80", "[]:1", "a b:1", "[::1:2", "a:1:2", "a:x",
        ] {
            assert!(bad.parse::<Rendezvous>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_world_is_consistent_or_an_error(
            values in prop::collection::vec(prop::option::of("[0-9]{0,3}|[a-z+-]{1,2}"), 8),
        ) {
            let names = [
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                "PMI_RANK", "PMI_SIZE",
            ];
            let read = World::from_variables(&Given::default(), |name| {
                let at = names.iter().position(|known| *known == name)?;
                values[at].clone().map(OsString::from)
            });
            if let Ok(Some(world)) = read {
                prop_assert!(world.size > 1 && world.rank < world.size);
                prop_assert!(world.local_rank < world.local_size && world.local_size <= world.size);
            }
        }
    }
}
