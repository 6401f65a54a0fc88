//! Several processes that load one model together, as launchers start them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tightfit_tests::command::{Outcome, Running, Scratchpad};
use tightfit_tests::json_schema::Schema;
use tightfit_tests::models;

const USAGE: i32 = 2;
const CHECKPOINT: i32 = 3;
const DOES_NOT_FIT: i32 = 4;
const DEVICE: i32 = 6;

/// For each of four ranks enough for a good quarter of the model, and not for a third.
const QUARTER: &str = "sim:2560KiB";

/// An address at which nobody listens.
fn address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 12, 256);
    scratchpad
}

/// Starts a command as each rank of a world of so many, with these arguments and those of the rank.
fn start(
    scratchpad: &Scratchpad,
    size: u32,
    arguments: &[&str],
    of_rank: impl Fn(u32) -> Vec<String>,
) -> Vec<Running> {
    let address = address();
    let rank = |rank: u32| {
        let mut all: Vec<String> = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        let place = [
            "--rank".to_owned(),
            rank.to_string(),
            "--world".to_owned(),
            size.to_string(),
            "--rendezvous".to_owned(),
            address.clone(),
        ];
        all.extend(place);
        all.extend(of_rank(rank));
        scratchpad.start(&all)
    };
    (0..size).map(rank).collect()
}

fn run(scratchpad: &Scratchpad, size: u32, arguments: &[&str]) -> Vec<Outcome> {
    let ranks = start(scratchpad, size, arguments, |_| Vec::new());
    ranks.into_iter().map(Running::finish).collect()
}

/// A report of the documented form.
#[track_caller]
fn report(outcome: &Outcome) -> Value {
    let schema = Schema::new(include_str!("../../output.schema.json"));
    let report = outcome.json();
    let errors = schema.errors("report", &report);
    assert!(errors.is_empty(), "{errors:#?} in {outcome:#?}");
    report
}

/// Every tensor that is loaded, with its device, format and bytes.
fn loaded(report: &Value) -> BTreeMap<String, (String, String, u64)> {
    let placements = report["placements"].as_array().unwrap().iter();
    placements
        .filter_map(|placement| {
            let text = |name: &str| placement[name].as_str().map(str::to_owned);
            let what = (
                text("device")?,
                text("format")?,
                placement["bytes"].as_u64()?,
            );
            Some((text("tensor")?, what))
        })
        .collect()
}

#[test]
fn four_processes_load_each_its_share() {
    let scratchpad = scratchpad();
    let devices = ["m", "--device", QUARTER, "--placements", "--json"];
    let of_all = scratchpad
        .run(&[&["plan", "--world", "4"], &devices[..]].concat())
        .succeeds();
    let plan = report(&of_all);
    assert_eq!(
        plan["ranks"],
        json!({"rank": null, "world": 4, "agreed": false, "turned_away": 0})
    );
    let names: Vec<&str> = plan["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["0/sim:0", "1/sim:0", "2/sim:0", "3/sim:0"]);
    let alone = [
        "load",
        "m",
        "--device",
        "sim:1GiB",
        "--placements",
        "--json",
    ];
    let single = report(&scratchpad.run(&alone).succeeds());
    assert!(single.get("ranks").is_none());

    let outcomes = run(&scratchpad, 4, &[&["load"], &devices[..]].concat());
    let mut union = BTreeMap::new();
    let mut read = 0;
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let report = report(&outcome.succeeds());
        assert_eq!(
            report["ranks"],
            json!({"rank": rank, "world": 4, "agreed": true, "turned_away": 0})
        );
        // Its peak is that of the plan, which anybody can make.
        assert_eq!(report["digest"], plan["digest"]);
        let [device] = &report["devices"].as_array().unwrap()[..] else {
            panic!("{report:#}");
        };
        let planned = &plan["devices"][rank];
        assert_eq!(device["peak_reserved"], planned["reserved"]);
        assert!(planned["reserved"].as_u64().unwrap() > 0);
        assert_eq!(device["name"], planned["name"]);
        assert_eq!(device["tensors"], planned["tensors"]);
        read += report["load"]["bytes_read"].as_u64().unwrap();
        for (tensor, (device, format, bytes)) in loaded(&report) {
            assert_eq!(device, names[rank]);
            let twice = union.insert(tensor, (format, bytes));
            assert_eq!(twice, None);
        }
    }
    let whole = loaded(&single).into_iter();
    let whole: BTreeMap<_, _> = whole
        .map(|(tensor, (_, format, bytes))| (tensor, (format, bytes)))
        .collect();
    assert_eq!(union, whole);
    assert_eq!(single["load"]["bytes_read"], read);
    assert_eq!(single["model"]["source_bytes"], read);

    // What a rank would load is known without the others.
    let alone = ["--rank", "2", "--world", "4"];
    let share = scratchpad
        .run(&[&["plan"], &alone[..], &devices].concat())
        .succeeds();
    let share = report(&share);
    assert_eq!(share["digest"], plan["digest"]);
    assert_eq!(share["devices"].as_array().unwrap().len(), 1);
    assert_eq!(share["devices"][0]["name"], "2/sim:0");
    // And told to people.
    let people = ["m", "--device", QUARTER];
    let text = scratchpad
        .run(&[&["load"], &alone[..], &people].concat())
        .succeeds()
        .stdout;
    let digest = plan["digest"].as_str().unwrap();
    for part in ["rank 2 of 4\n", digest, "2/sim:0", "as stored of this rank"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn slices_of_one_tensor_go_to_all_ranks() {
    let scratchpad = Scratchpad::new();
    // Rows of 32 KiB: of shorter ones a quarter lies on the same pages as the others, which are read with it.
    models::write_decoder_with(&scratchpad.path("m"), 2, 64, 16 << 10);
    let config = scratchpad.path("m/config.json");
    let mut with_heads: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    with_heads["num_attention_heads"] = json!(8);
    with_heads["num_key_value_heads"] = json!(8);
    fs::write(&config, with_heads.to_string()).unwrap();
    let devices = [
        "m",
        "--device",
        "sim:8MiB",
        "--policy",
        "tensor-parallel",
        "--placements",
        "--json",
    ];
    let plan = scratchpad
        .run(&[&["plan", "--world", "4"], &devices[..]].concat())
        .succeeds();
    let plan = report(&plan);
    let outcomes = run(&scratchpad, 4, &[&["load"], &devices[..]].concat());
    let mut union = BTreeMap::new();
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let report = report(&outcome.succeeds());
        assert_eq!(report["digest"], plan["digest"]);
        assert_eq!(
            report["devices"][0]["peak_reserved"],
            plan["devices"][rank]["reserved"]
        );
        let source = report["model"]["source_bytes"].as_f64().unwrap();
        // A quarter, and what all have; where files are not mapped, some of what lies between, too.
        let read = report["load"]["bytes_read"].as_f64().unwrap();
        assert!(read < 0.30 * source, "{read} of {source}");
        let mine = loaded(&report);
        assert!(mine.keys().any(|tensor| tensor.contains('[')), "{mine:#?}");
        for (tensor, what) in mine {
            let twice = union.insert(tensor.clone(), what);
            assert!(twice.is_none(), "{tensor} is there twice");
        }
    }
    assert_eq!(union, loaded(&plan));
}

#[test]
fn ranks_may_have_devices_of_their_own() {
    let scratchpad = scratchpad();
    let devices = [
        "--device",
        "1/sim:4MiB",
        "--device",
        "0/sim:4MiB",
        "--device",
        "1/sim:4MiB",
    ];
    let ranks = run(
        &scratchpad,
        2,
        &[&["load", "m", "--json"], &devices[..]].concat(),
    );
    let devices = |outcome: Outcome| -> Vec<String> {
        let report = report(&outcome.succeeds());
        let devices = report["devices"].as_array().unwrap().iter();
        devices
            .map(|device| device["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let devices: Vec<_> = ranks.into_iter().map(devices).collect();
    assert_eq!(devices, [vec!["0/sim:0"], vec!["1/sim:0", "1/sim:1"]]);
    for (devices, part) in [
        (
            ["--device", "0/cpu:1GiB", "--device", "cpu:1GiB"],
            "either all do or none",
        ),
        (
            ["--device", "0/cpu:1GiB", "--device", "2/cpu:1GiB"],
            "there are 2 ranks",
        ),
    ] {
        let plan = [&["plan", "m", "--world", "2"], &devices[..]].concat();
        scratchpad.run(&plan).fails(USAGE, &[part]);
    }
    let plan = ["plan", "m", "--world", "2", "--device", "cpu"];
    scratchpad
        .run(&plan)
        .fails(DEVICE, &["0/cpu", "give it a size"]);
    scratchpad
        .run(&["plan", "m", "--device", "1/sim:1GiB"])
        .fails(USAGE, &["--world"]);
    scratchpad
        .run(&["plan", "m", "--device", "cuda"])
        .fails(USAGE, &["only one process"]);
}

#[test]
fn all_refuse_with_one_sentence() {
    let scratchpad = scratchpad();
    let outcomes = run(
        &scratchpad,
        4,
        &["load", "m", "--device", "sim:1MiB", "--json"],
    );
    let first = outcomes[0].stderr.clone();
    for outcome in outcomes {
        assert_eq!(outcome.stderr, first);
        let outcome = outcome.fails(DOES_NOT_FIT, &["refuses"]);
        // With all that is known of it, as for one process.
        let error = &outcome.json()["error"];
        assert_eq!(error["kind"], "does-not-fit");
        assert!(error["missing_bytes"].as_u64().unwrap() > 0);
    }
}

#[test]
fn what_one_rank_lacks_ends_all_before_anything_is_reserved() {
    let scratchpad = scratchpad();
    // The same names, and one matrix more.
    models::write_decoder(&scratchpad.path("other"), 12, 128);
    let load = |other: &'static str| {
        let model = move |rank: u32| vec![if rank == 2 { other } else { "m" }.to_owned()];
        let arguments = ["load", "--device", QUARTER, "--json"];
        let ranks = start(&scratchpad, 4, &arguments, model);
        ranks.into_iter().map(Running::finish).collect::<Vec<_>>()
    };
    let sentence = "rank 2 sees other files than rank 0";
    let outcomes = load("other");
    let first = outcomes[0].stderr.clone();
    for outcome in outcomes {
        assert_eq!(outcome.stderr, first);
        let outcome = outcome.fails(CHECKPOINT, &[sentence]);
        assert_eq!(outcome.json()["error"]["kind"], "rank");
    }
    let outcomes = load("./missing");
    let first = outcomes[0].stderr.clone();
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        assert_eq!(outcome.stderr, first);
        let outcome = outcome.fails(CHECKPOINT, &["rank 2: ", "missing"]);
        // Who lacks it says which file.
        let kind = if rank == 2 { "checkpoint" } else { "rank" };
        assert_eq!(outcome.json()["error"]["kind"], kind);
    }
}

#[test]
fn another_policy_on_one_rank_is_found() {
    let scratchpad = scratchpad();
    let policy = |rank: u32| match rank {
        1 => vec!["--set".to_owned(), "double-quant=true".to_owned()],
        _ => Vec::new(),
    };
    let ranks = start(
        &scratchpad,
        2,
        &["load", "m", "--device", "sim:8MiB"],
        policy,
    );
    for rank in ranks {
        rank.finish().fails(
            USAGE,
            &["rank 1 has made another plan", "policy and settings"],
        );
    }
    let device = |rank: u32| vec!["--device".to_owned(), format!("sim:{}MiB", 8 + rank)];
    for rank in start(&scratchpad, 2, &["load", "m"], device) {
        // Each has told of its own, so that both count with the same.
        rank.finish().succeeds();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn when_one_is_killed_the_others_end_with_a_sentence() {
    use tightfit_tests::command::bytes_read;
    let scratchpad = Scratchpad::new();
    let synth = ["synth", "qwen2.5-7b", "m", "--headers-only"];
    scratchpad.run(&synth).succeeds();
    let load = ["load", "m", "--device", "sim:1536MiB", "--threads", "1"];
    let mut ranks = start(&scratchpad, 4, &load, |_| Vec::new());
    assert!(ranks[2].kill_when(|process| bytes_read(process) > 64 << 20));
    let start = Instant::now();
    for (rank, outcome) in ranks.into_iter().map(Running::finish).enumerate() {
        if rank == 2 {
            assert_eq!(outcome.status, None);
            continue;
        }
        outcome.fails(
            DEVICE,
            &["tightfit: rank 2 has ended before its share was loaded\n"],
        );
    }
    // Not when they were done, or a time limit had passed.
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn launchers_variables_are_enough() {
    let model = scratchpad();
    let path = model.path("m");
    let path = path.to_str().unwrap();
    let address = address();
    let (host, port) = address.split_once(':').unwrap();
    let before = (port.parse::<u16>().unwrap() - 1).to_string();
    let rank = |rank: &str| {
        let mut scratchpad = Scratchpad::new();
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", host),
            ("MASTER_PORT", &before),
        ] {
            scratchpad.set(name, value);
        }
        scratchpad
    };
    let scratchpads = ["0", "1"].map(rank);
    // Without a device each has its share of the host's memory.
    let load = ["load", path, "--json"];
    let ranks = scratchpads
        .each_ref()
        .map(|scratchpad| scratchpad.start(&load));
    let reports = ranks.map(|rank| report(&rank.finish().succeeds()));
    assert_eq!(reports[0]["digest"], reports[1]["digest"]);
    for (rank, report) in reports.iter().enumerate() {
        assert_eq!(report["ranks"]["rank"], rank);
        assert_eq!(report["devices"][0]["name"], format!("{rank}/cpu"));
    }
    // Who says that it is alone, is.
    let alone = [
        "load", path, "--world", "1", "--device", "sim:1GiB", "--json",
    ];
    let alone = report(&scratchpads[1].run(&alone).succeeds());
    assert!(alone.get("ranks").is_none());
    let mut wrong = Scratchpad::new();
    wrong.set("RANK", "first");
    wrong.set("WORLD_SIZE", "2");
    wrong
        .run(&["load", path, "--device", "sim:1GiB", "--json"])
        .fails(USAGE, &["RANK is 'first'"]);
    wrong.run(&["inspect", path]).succeeds();
}

#[test]
fn a_digest_pins_a_plan() {
    let scratchpad = scratchpad();
    let devices = ["m", "--device", QUARTER, "--json"];
    let plan = scratchpad.run(&[&["plan", "--world", "4"], &devices[..]].concat());
    let plan = plan.succeeds().json();
    let digest = plan["digest"].as_str().unwrap();
    let rank = ["--rank", "3", "--world", "4", "--digest"];
    // Nobody has to be asked where all sizes are given.
    let loaded = scratchpad.run(&[&["load"], &rank[..], &[digest], &devices].concat());
    let loaded = report(&loaded.succeeds());
    assert_eq!(loaded["digest"], plan["digest"]);
    assert_eq!(loaded["ranks"]["agreed"], false);
    let other = format!("{}{}", &digest[1..], &digest[..1]);
    assert_ne!(digest, other);
    for command in ["load", "plan"] {
        let words = ["the plan's digest is", digest, &other, "--digest"];
        let ranked = [&[command], &rank[..], &[&other], &devices].concat();
        scratchpad.run(&ranked).fails(USAGE, &words);
        let alone = [command, "m", "--device", "sim:1GiB", "--digest", &other];
        scratchpad
            .run(&alone)
            .fails(USAGE, &["the plan's digest is", &other]);
    }
    for all in run(
        &scratchpad,
        2,
        &["load", "m", "--device", "sim:8MiB", "--digest", &other],
    ) {
        all.fails(USAGE, &["tightfit: the plan's digest is", &other]);
    }
    scratchpad
        .run(&["plan", "m", "--device", "sim:1GiB", "--digest", "x"])
        .fails(USAGE, &["64 hexadecimal digits"]);
}

#[test]
fn strangers_do_not_keep_ranks_apart() {
    let scratchpad = scratchpad();
    let address = address();
    let rank = |rank: &str| {
        let place = ["--rank", rank, "--world", "2", "--rendezvous", &address];
        let load = ["load", "m", "--device", "sim:8MiB", "--json"];
        scratchpad.start(&[&load[..], &place].concat())
    };
    let first = rank("0");
    let mut strangers = Vec::new();
    let start = Instant::now();
    while strangers.len() < 3 {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody listens");
        match TcpStream::connect(&address) {
            Ok(mut stream) => {
                let talks = strangers.len() < 2;
                if talks {
                    stream
                        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nAccept: everything\r\n\r\n")
                        .unwrap();
                }
                strangers.push(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    let second = rank("1");
    let first = report(&first.finish().succeeds());
    assert!(
        first["ranks"]["turned_away"].as_u64().unwrap() >= 1,
        "{first:#}"
    );
    report(&second.finish().succeeds());
}

#[test]
fn who_does_not_come_is_waited_for_as_long_as_was_said() {
    let scratchpad = scratchpad();
    let address = address();
    let load = [
        "load",
        "m",
        "--device",
        "sim:8MiB",
        "--world",
        "3",
        "--rendezvous",
        &address,
    ];
    let rank = |rank: &str| {
        let rank = ["--rank", rank, "--rendezvous-timeout", "1", "--json"];
        scratchpad.start(&[&load[..], &rank].concat())
    };
    let ranks = [rank("0"), rank("2")];
    for rank in ranks {
        rank.finish()
            .fails(DEVICE, &["rank 1 has not come to", &address, "within 1 s"]);
    }
    rank("1")
        .finish()
        .fails(DEVICE, &["rank 0 was not found at", &address]);
}

#[test]
fn arguments_that_make_no_world_are_refused() {
    let scratchpad = scratchpad();
    let device = ["m", "--device", "sim:1GiB"];
    for (arguments, part) in [
        (&["load", "--rank", "1"][..], "--world"),
        (&["load", "--world", "4"], "needs --rank"),
        (&["load", "--rank", "4", "--world", "4"], "--rank is 4"),
        (&["plan", "--world", "0"], "--world 0"),
        (&["plan", "--world", "5000"], "--world 5000"),
        (&["load", "--rendezvous", "nowhere"], "HOST:PORT"),
        (
            &["load", "--rank", "0", "--world", "2", "--save", "s"],
            "--save",
        ),
    ] {
        scratchpad
            .run(&[arguments, &device].concat())
            .fails(USAGE, &[part]);
    }
    assert!(!fs::exists(scratchpad.path("s")).unwrap());
}
