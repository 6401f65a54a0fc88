use proptest::prelude::*;
use roxmltree::{Document, Node};

use super::*;
use crate::draw::samples::{decoder, device, tensor};
use tightfit::types::{Format, Placement};

fn plan_of(tensors: &[TensorInfo], devices: u32, headroom: u64) -> Plan {
    let infos: Vec<_> = (0..devices as usize)
        .map(|index| device(index, (1 << 28) + 777))
        .collect();
    let placements: Vec<Placement> = tensors
        .iter()
        .enumerate()
        .map(|(index, _)| Placement {
            device: Some(index as u32 % devices),
            format: if index % 3 == 0 {
                Format::Stored
            } else {
                Format::NF4
            },
        })
        .collect();
    let headroom = vec![headroom; devices as usize];
    Plan::new(tensors, &[], &infos, &placements, &headroom).unwrap()
}

fn heading() -> Heading<'static> {
    Heading {
        model: "some/model",
        policy: "auto 1.0.0",
    }
}

fn bars<'a>(document: &'a Document<'a>) -> Vec<Node<'a, 'a>> {
    let is_bar = |node: &Node<'_, '_>| node.has_tag_name("g");
    document.descendants().filter(is_bar).collect()
}

fn number(node: Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).unwrap().parse().unwrap()
}

/// Two bars for each device, whose segments are as wide as their bytes and fill the capacity.
fn check(text: &str, capacities: &[u64]) {
    let document = Document::parse(text).unwrap();
    let bars = bars(&document);
    assert_eq!(bars.len(), 2 * capacities.len());
    for (bar, capacity) in bars.iter().zip(capacities.iter().flat_map(|c| [c, c])) {
        let mut end = MARGIN;
        let mut sum = 0;
        for part in bar.children().filter(|node| node.has_tag_name("rect")) {
            let bytes: u64 = part.attribute("data-bytes").unwrap().parse().unwrap();
            let share = bytes as f64 / *capacity as f64;
            assert!((number(part, "width") - WIDTH * share).abs() < 1e-5);
            assert!((number(part, "x") - end).abs() < 1e-5 * 300.0);
            end = number(part, "x") + number(part, "width");
            sum += bytes;
        }
        assert_eq!(sum, *capacity);
        assert!((end - MARGIN - WIDTH).abs() < 1e-4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn segments_are_in_proportion_and_fill_the_device(
        layers in 0u32..600,
        devices in 1u32..4,
        headroom in 0u64..1 << 20,
    ) {
        let tensors = decoder(layers);
        let plan = plan_of(&tensors, devices, headroom);
        let text = svg(heading(), &tensors, &plan);
        let capacities: Vec<u64> = plan.devices.iter().map(|d| d.device.capacity).collect();
        check(&text, &capacities);
    }
}

#[test]
fn names_cannot_break_out_of_the_text() {
    let evil = "</title><script>alert('x')</script>&\"\u{ffff}\u{202e}";
    let tensors = [tensor(evil, &[64, 64]), tensor(&"a<".repeat(9000), &[4])];
    let mut plan = plan_of(&tensors, 1, 0);
    plan.devices[0].device.name = evil.to_owned();
    let heading = Heading {
        model: evil,
        policy: evil,
    };
    let text = svg(heading, &tensors, &plan);
    check(&text, &[plan.devices[0].device.capacity]);
    let document = Document::parse(&text).unwrap();
    assert!(
        !document
            .descendants()
            .any(|node| node.has_tag_name("script"))
    );
    let titles = document.descendants().filter(|n| n.has_tag_name("title"));
    let titles: Vec<&str> = titles.filter_map(|node| node.text()).collect();
    assert!(
        titles[1].starts_with("</title><script>alert("),
        "{titles:?}"
    );
    assert!(text.len() < 20_000 && !text.contains('\u{202e}'));
}

#[test]
fn a_large_model_makes_no_large_file() {
    let tensors = decoder(20_000);
    let plan = plan_of(&tensors, 1, 0);
    let text = svg(heading(), &tensors, &plan);
    assert!(text.len() < 200_000, "{}", text.len());
    assert!(text.contains(" to model.layers "));
}
