//! A policy that misbehaves as it is told: in `plan` by the setting `behavior`, in `describe`,
//! which is given no settings, by a text that tests write over [`IN_DESCRIBE`] in the module.
#![forbid(unsafe_code)]

use std::hint::black_box;

use tightfit_guest::sizing::Sizer;
use tightfit_guest::{
    Description, Dtype, Format, Level, Nf4Format, Placement, Policy, Proposal, Refusal, Request,
    Setting, Tensor, log, policy,
};

/// What `describe` does: a marker that tests look for, and the name of a behavior.
static IN_DESCRIBE: [u8; 32] = *b"in-describe:honest              ";

/// Clears the screen, sets the window's title, rings, returns the carriage, reverses the text.
const ESCAPES: &str = "evil\x1b[2J\x1b]0;owned\x07\r\u{9b}31m\u{202e}txt\u{200b}\u{2028}\u{ad}\u{61c}\u{feff}\u{e0041}";

struct Hostile;

policy!(Hostile);

impl Policy for Hostile {
    fn describe() -> Description {
        let marked = String::from_utf8_lossy(black_box(&IN_DESCRIBE)).into_owned();
        let behavior = marked.trim_end().trim_start_matches("in-describe:");
        let name = match behavior {
            "honest" | "many-settings" | "long-help" => "hostile".to_owned(),
            "escape" => ESCAPES.to_owned(),
            "long" => "x".repeat(1 << 20),
            "giant" => "x".repeat(40 << 20),
            other => match misbehave(other) {
                Some(never) => never,
                None => panic!("no behavior in describe is called `{other}`"),
            },
        };
        let setting = Setting {
            name: "behavior".to_owned(),
            default: "honest".to_owned(),
            help: "What to do.".to_owned(),
        };
        let settings = match behavior {
            "many-settings" => vec![setting; 10_000],
            "long-help" => vec![Setting {
                default: "d".repeat(1 << 20),
                help: "h".repeat(1 << 20),
                ..setting
            }],
            _ => vec![setting],
        };
        Description {
            name,
            version: "1.0.0".to_owned(),
            settings,
        }
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let behavior = match request.settings.first() {
            Some((_, behavior)) => behavior.clone(),
            None => "honest".to_owned(),
        };
        let honest = honest(&request);
        match behavior.as_str() {
            "honest" => Ok(honest),
            "too-few" => Ok(edited(honest, |p| {
                p.placements.pop();
            })),
            "too-many" => Ok(edited(honest, |p| p.placements.push(p.placements[0]))),
            "no-such-device" => Ok(edited(honest, |p| {
                if let Some(last) = p.placements.last_mut() {
                    last.device = Some(request.devices.len() as u32);
                }
            })),
            "nf4" => Ok(with_format(honest, nf4(64))),
            "block-48" => Ok(with_format(honest, nf4(48))),
            "cast-i8" => Ok(with_format(honest, Format::Cast(Dtype::I8))),
            "torn-tie" => Ok(edited(honest, |p| {
                for tie in &request.ties {
                    if let Some(alias) = tie.alias_tensor {
                        p.placements[alias as usize] = Placement {
                            device: Some(0),
                            format: nf4(64),
                        };
                    }
                }
            })),
            "few-headrooms" => Ok(edited(honest, |p| p.headroom.clear())),
            "many-headrooms" => Ok(edited(honest, |p| p.headroom.push(0))),
            "endless-headroom" => Ok(edited(honest, |p| p.headroom[0] = u64::MAX)),
            "load-nothing" => Ok(edited(honest, |p| {
                for placement in &mut p.placements {
                    placement.device = None;
                }
            })),
            "refuse-to-fit" => Err(Refusal::does_not_fit("it is all too much", Some(12345))),
            "refuse-setting" => Err(Refusal::bad_setting("I do not like this setting")),
            "refuse-model" => Err(Refusal::unsupported("I do not like this model")),
            "refuse-with-escapes" => Err(Refusal::unsupported(ESCAPES)),
            "refuse-at-length" => Err(Refusal::unsupported("x".repeat(1 << 20))),
            "refuse-without-end" => Err(Refusal::unsupported("x".repeat(40 << 20))),
            "flood-the-log" => {
                let message = format!("flood {}", "y".repeat(1000));
                for _ in 0..20_000 {
                    log(Level::Warn, &message);
                }
                Ok(honest)
            }
            "log-a-giant" => {
                log(Level::Info, &"z".repeat(40 << 20));
                Ok(honest)
            }
            "ask-a-giant-shape" => {
                let shape = vec![1; 5 << 20];
                let tensor = Tensor {
                    name: String::new(),
                    dtype: Dtype::Bf16,
                    shape,
                    bytes: 0,
                    quantized: None,
                };
                let _ = black_box(Sizer::new().size(&tensor, Format::Stored));
                Ok(honest)
            }
            "millions-of-placements" => Ok(edited(honest, |p| {
                p.placements = vec![p.placements[0]; 3 << 20];
            })),
            "millions-of-headrooms" => Ok(edited(honest, |p| p.headroom = vec![1; 5 << 20])),
            "log-escapes" => {
                log(Level::Warn, ESCAPES);
                Ok(honest)
            }
            "ask-absurd-sizes" => {
                let shapes: [&[u64]; 4] = [&[u64::MAX, 2], &[1 << 61], &[0, u64::MAX], &[1; 1000]];
                for shape in shapes {
                    for format in [Format::Stored, nf4(0), nf4(64), nf4(u32::MAX)] {
                        let tensor = Tensor {
                            name: String::new(),
                            dtype: Dtype::Bf16,
                            shape: shape.to_vec(),
                            bytes: 0,
                            quantized: None,
                        };
                        // Answered with an error or a size: either will do.
                        let _ = black_box(Sizer::new().size(&tensor, format));
                    }
                }
                Ok(honest)
            }
            other => match misbehave(other) {
                Some(_) => Ok(honest),
                None => Err(Refusal::bad_setting(format!(
                    "no behavior is called `{other}`"
                ))),
            },
        }
    }
}

/// What can be done anywhere and does not return. `None` when the behavior is another.
fn misbehave(behavior: &str) -> Option<String> {
    match behavior {
        "loop" => loop {
            black_box(behavior);
        },
        "panic" => panic!("the policy has lost its head"),
        "recurse" => Some(dive(1).to_string()),
        "eat-memory" => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(black_box(vec![1u8; 1 << 20]));
            }
        }
        _ => None,
    }
}

/// Everything on the first device as it is; second copies of tied tensors are left out.
fn honest(request: &Request) -> Proposal {
    let duplicates = request.duplicates();
    let placements = duplicates.iter().map(|&duplicate| Placement {
        device: (!duplicate).then_some(0),
        format: Format::Stored,
    });
    Proposal {
        placements: placements.collect(),
        headroom: vec![0; request.devices.len()],
    }
}

fn edited(mut proposal: Proposal, edit: impl FnOnce(&mut Proposal)) -> Proposal {
    edit(&mut proposal);
    proposal
}

/// Loads every tensor in this format.
fn with_format(proposal: Proposal, format: Format) -> Proposal {
    edited(proposal, |p| {
        for placement in &mut p.placements {
            placement.device = Some(0);
            placement.format = format;
        }
    })
}

fn nf4(block_size: u32) -> Format {
    Format::Nf4(Nf4Format {
        block_size,
        double_quantized: false,
    })
}

/// Too deep for any stack. Neither a loop in disguise (rotation and sum do not commute) nor in
/// need of memory.
#[inline(never)]
fn dive(depth: u64) -> u64 {
    if depth == 0 {
        return 0;
    }
    dive(depth + 1).rotate_left(7) + depth
}
