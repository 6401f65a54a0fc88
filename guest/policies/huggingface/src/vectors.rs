//! Maps that were worked out by hand from the description of the algorithm, or printed in reports
//! of it. Budgets are balanced as both libraries did until transformers looked at unsplittable
//! modules beside layers, and sizes are counted as transformers counts them.

use tightfit_guest::settings::Settings;
use tightfit_guest::{Request, formats as sdk};

use crate::budgets::{Budgets, Place, balance};
use crate::device_map::device_map;
use crate::fixtures::{
    GEMMA3_27B, GIB, MIXTRAL, QWEN2_7B, Shape, decoder, request, set, sims, tie,
};
use crate::formats::formats;
use crate::model::Model;
use crate::options::{Library, Options, SPECS};
use crate::place::place;
use crate::sizes::Sizes;

const ROPE: &str = r#"{"rope_theta": 1e6, "head_dim": 128}"#;

/// Budgets as placed with, in GiB to two digits, and the map.
fn old_map(request: &Request, free: &[f64]) -> (Vec<String>, Vec<(String, Place)>) {
    let kinds = sdk::kinds(request);
    let mut options = Options::read(&Settings::new(SPECS, request)).unwrap();
    let formats = formats(request, &kinds, &options);
    let model = Model::new(request, &request.duplicates());
    let sizes = Sizes::new(request, &model, &kinds, &formats, &options);
    let mut budgets: Budgets = (0..)
        .map(Place::Gpu)
        .zip(free.iter().map(|gib| gib * GIB))
        .collect();
    // Of accelerate is only which block the budgets leave room for.
    options.library = Library::Accelerate;
    balance(&mut budgets, &model, &sizes, &options, true).unwrap();
    if sizes.quantized {
        budgets.iter_mut().for_each(|(_, bytes)| *bytes *= 0.90);
    }
    let placed = place(&model, &sizes, &budgets, Library::Transformers);
    let shown = budgets
        .iter()
        .map(|(_, bytes)| format!("{:.2}", bytes / GIB));
    (shown.collect(), device_map(request, &model.tree, &placed))
}

/// For each device in use the first and the last layer, and what else it has.
fn summary(map: &[(String, Place)], layers: u64) -> Vec<(u32, Vec<String>)> {
    let mut found: Vec<(u32, Vec<String>)> = Vec::new();
    let names = ["model.embed_tokens".to_owned()]
        .into_iter()
        .chain((0..layers).map(|layer| format!("model.layers.{layer}")))
        .chain(["model.norm".to_owned(), "lm_head".to_owned()]);
    for name in names {
        let holds = |key: &str| {
            key.is_empty()
                || name == key
                || name.strip_prefix(key).is_some_and(|r| r.starts_with('.'))
        };
        let (_, place) = map.iter().find(|(key, _)| holds(key)).unwrap();
        let Place::Gpu(gpu) = *place else {
            panic!("{name} is on {place:?}");
        };
        match found.last_mut() {
            Some((last, names)) if *last == gpu => names.push(name),
            _ => found.push((gpu, vec![name])),
        }
    }
    found
}

/// `(gpu, first, last)` of what is in a row.
fn runs(map: &[(String, Place)], shape: Shape) -> Vec<(u32, String, String)> {
    let summary = summary(map, shape.layers).into_iter();
    summary
        .map(|(gpu, names)| {
            let short = |name: &String| name.trim_start_matches("model.").replace("layers.", "L");
            (gpu, short(&names[0]), short(names.last().unwrap()))
        })
        .collect()
}

fn is(found: &[(u32, String, String)], expected: &[(u32, &str, &str)]) {
    let found: Vec<(u32, &str, &str)> = found.iter().map(|(g, a, b)| (*g, &**a, &**b)).collect();
    assert_eq!(found, expected);
}

#[test]
fn mixtral_in_16_bits_leaves_the_last_of_eight_empty() {
    let mut request = request(decoder(MIXTRAL, true), sims(8, 78.92), ROPE);
    set(&mut request, "skip", "*");
    let (budgets, map) = old_map(&request, &[78.92; 8]);
    assert_eq!(budgets[..7], ["14.25"; 7]);
    assert_eq!(budgets[7], "78.92");
    is(
        &runs(&map, MIXTRAL),
        &[
            (0, "embed_tokens", "L3"),
            (1, "L4", "L8"),
            (2, "L9", "L13"),
            (3, "L14", "L18"),
            (4, "L19", "L23"),
            (5, "L24", "L28"),
            (6, "L29", "lm_head"),
        ],
    );
}

#[test]
fn qwen2_7b_piles_up_on_the_last() {
    let request = request(decoder(QWEN2_7B, true), sims(8, 23.5), ROPE);
    let (budgets, map) = old_map(&request, &[23.5; 2]);
    assert_eq!(budgets, ["2.40", "21.15"]);
    let expected = [(0, "embed_tokens", "L2"), (1, "L3", "lm_head")];
    is(&runs(&map, QWEN2_7B), &expected);

    let (budgets, map) = old_map(&request, &[23.5; 4]);
    assert_eq!(budgets, ["1.26", "1.26", "1.26", "21.15"]);
    is(
        &runs(&map, QWEN2_7B),
        &[
            (1, "embed_tokens", "L1"),
            (2, "L2", "L12"),
            (3, "L13", "lm_head"),
        ],
    );

    let (budgets, map) = old_map(&request, &[23.5; 8]);
    assert_eq!(budgets[..7], ["0.69"; 7]);
    is(&runs(&map, QWEN2_7B), &[(7, "embed_tokens", "lm_head")]);
    assert_eq!(map, [(String::new(), Place::Gpu(7))]);
}

#[test]
fn gemma3_27b_is_on_the_last_of_eight() {
    let mut request = request(decoder(GEMMA3_27B, false), sims(8, 22.0), ROPE);
    tie(&mut request);
    let (budgets, map) = old_map(&request, &[22.0; 8]);
    assert_eq!(budgets[..7], ["1.85"; 7]);
    assert_eq!(budgets[7], "19.80");
    assert_eq!(map, [(String::new(), Place::Gpu(7))]);
}
