//! A program that misbehaves as its first argument tells it. What the host answers to it is what it
//! gives up with, so that tests see the host's own words.

mod handles;
mod linear;
mod memory;
mod models;
mod slices;
mod transformer;

use std::hint::black_box;

use tightfit_program::{Error, GaveUp, Level, Program, log, program};

struct Hostile;

program!(Hostile);

/// Clears the screen, sets the window's title, rings, returns the carriage, reverses the text.
const ESCAPES: &str = "evil\x1b[2J\x1b]0;owned\x07\r\u{9b}31m\u{202e}txt\u{200b}\u{2028}\u{ad}\u{61c}\u{feff}\u{e0041}";

impl Program for Hostile {
    fn run(arguments: Vec<String>) -> Result<String, GaveUp> {
        let (behavior, rest) = arguments.split_first().ok_or("what shall I do?")?;
        let answered = memory::misbehave(behavior, rest)
            .or_else(|| models::misbehave(behavior, rest))
            .or_else(|| slices::misbehave(behavior, rest))
            .or_else(|| linear::misbehave(behavior, rest))
            .or_else(|| transformer::misbehave(behavior, rest))
            .or_else(|| handles::misbehave(behavior));
        match answered {
            Some(answer) => answer.map_err(|error| GaveUp::from(format!("{error:?}"))),
            None => misbehave(behavior, rest),
        }
    }
}

/// What the host has answered.
type Answer = Result<String, Error>;

/// What needs nothing of the host.
fn misbehave(behavior: &str, rest: &[String]) -> Result<String, GaveUp> {
    match behavior {
        "loop" => loop {
            black_box(behavior);
        },
        "panic" => panic!("the program has lost its head"),
        "recurse" => Ok(dive(1).to_string()),
        "eat-memory" => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(black_box(vec![1u8; 1 << 20]));
            }
        }
        "count-arguments" => {
            let bytes: usize = rest.iter().map(String::len).sum();
            Ok(format!("{} of {bytes} bytes", rest.len()))
        }
        "answer" => Ok("x".repeat(number(rest) as usize)),
        "give-up" => Err("x".repeat(number(rest) as usize).into()),
        "escape" => Ok(ESCAPES.into()),
        "give-up-with-escapes" => Err(ESCAPES.into()),
        "flood-the-log" => {
            let message = format!("flood {}", "y".repeat(1000));
            for _ in 0..20_000 {
                log(Level::Warn, &message);
            }
            Ok("flooded".into())
        }
        "log-and-loop" => {
            log(Level::Warn, "it begins");
            loop {
                black_box(behavior);
            }
        }
        _ => Err(format!("no behavior is called `{behavior}`").into()),
    }
}

/// A number as the first argument.
fn number(rest: &[String]) -> u64 {
    rest[0].parse().expect("tests give a number")
}

/// Too deep for any stack. Neither a loop in disguise (rotation and sum do not commute) nor in need
/// of memory.
#[inline(never)]
fn dive(depth: u64) -> u64 {
    if depth == 0 {
        return 0;
    }
    dive(depth + 1).rotate_left(7) + depth
}
