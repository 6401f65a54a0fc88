use super::*;

/// SplitMix64: the same cases on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn items(bytes: &[u64]) -> Vec<Item> {
    bytes
        .iter()
        .map(|&bytes| Item { bytes, headroom: 0 })
        .collect()
}

fn bins(capacities: &[u64]) -> Vec<Bin> {
    let bin = |&capacity: &u64| Bin {
        capacity,
        reserve: 0,
        granularity: 1,
    };
    capacities.iter().map(bin).collect()
}

fn case(random: &mut Random) -> (Vec<Item>, Vec<Bin>) {
    let count = random.below(8) as usize;
    let scale = [3, 20, 1000][random.below(3) as usize];
    let with_headroom = random.below(2) == 0;
    let items = (0..count)
        .map(|_| Item {
            bytes: random.below(scale),
            headroom: if with_headroom {
                random.below(scale)
            } else {
                0
            },
        })
        .collect();
    let bins = (0..1 + random.below(4))
        .map(|_| Bin {
            capacity: random.below(4 * scale),
            reserve: if random.below(3) == 0 {
                random.below(scale)
            } else {
                0
            },
            granularity: 1 + random.below(4),
        })
        .collect();
    (items, bins)
}

/// Every way to cut the items into one contiguous part per bin.
fn every_partition(count: usize, bins: usize) -> Vec<Vec<usize>> {
    if bins == 1 {
        return vec![vec![0; count]];
    }
    let mut all = Vec::new();
    for last in 0..=count {
        for mut owners in every_partition(count - last, bins - 1) {
            owners.extend(std::iter::repeat_n(bins - 1, last));
            all.push(owners);
        }
    }
    all
}

fn loads(items: &[Item], bins: &[Bin], owners: &[usize]) -> Vec<Option<Item>> {
    let mut loads = vec![None; bins.len()];
    for (&owner, &item) in owners.iter().zip(items) {
        loads[owner] = plus(loads[owner].unwrap_or_default(), item);
    }
    loads
}

fn fits(items: &[Item], bins: &[Bin], owners: &[usize]) -> bool {
    let loads = loads(items, bins, owners);
    bins.iter()
        .zip(loads)
        .all(|(bin, load)| load.is_none_or(|load| bin.holds(load, bin.capacity)))
}

fn empty(items: &[Item], bins: &[Bin], owners: &[usize]) -> usize {
    loads(items, bins, owners)
        .iter()
        .filter(|load| load.is_none())
        .count()
}

#[test]
fn balance_is_as_good_as_the_best_of_all_partitions() {
    let mut random = Random(1);
    let (mut fitted, mut refused) = (0, 0);
    for _ in 0..4000 {
        let (items, bins) = case(&mut random);
        let all = every_partition(items.len(), bins.len());
        let fitting: Vec<_> = all
            .into_iter()
            .filter(|owners| fits(&items, &bins, owners))
            .collect();
        let Some(answer) = balance(&items, &bins) else {
            assert!(fitting.is_empty(), "{items:?} {bins:?}");
            refused += 1;
            continue;
        };
        fitted += 1;
        assert!(
            fits(&items, &bins, &answer),
            "{items:?} {bins:?} {answer:?}"
        );
        assert!(answer.is_sorted());
        let level = fullest(&items, &bins, &answer);
        let as_full = |owners: &&Vec<usize>| !fullest(&items, &bins, owners).above(level);
        for owners in &fitting {
            assert!(
                !level.above(fullest(&items, &bins, owners)),
                "{items:?} {bins:?} {owners:?}"
            );
        }
        let fewest = fitting
            .iter()
            .filter(as_full)
            .map(|o| empty(&items, &bins, o))
            .min();
        assert_eq!(
            Some(empty(&items, &bins, &answer)),
            fewest,
            "{items:?} {bins:?} {answer:?}"
        );
    }
    assert!(fitted > 500 && refused > 500, "{fitted} {refused}");
}

#[test]
fn fill_fits_whenever_anything_does_and_uses_the_first_bins() {
    let mut random = Random(2);
    for _ in 0..2000 {
        let (items, bins) = case(&mut random);
        let all = every_partition(items.len(), bins.len());
        let any = all.iter().any(|owners| fits(&items, &bins, owners));
        assert_eq!(
            fill(&items, &bins).len() == items.len(),
            any,
            "{items:?} {bins:?}"
        );
    }
    assert_eq!(fill(&items(&[3, 3, 3]), &bins(&[6, 6, 6])), vec![0, 0, 1]);
}

#[test]
fn pack_uses_as_few_bins_as_the_best_of_all_partitions() {
    let mut random = Random(5);
    let (mut fitted, mut refused) = (0, 0);
    for _ in 0..4000 {
        let (items, bins) = case(&mut random);
        let used = |owners: &Vec<usize>| bins.len() - empty(&items, &bins, owners);
        let fewest = every_partition(items.len(), bins.len())
            .into_iter()
            .filter(|owners| fits(&items, &bins, owners))
            .map(|owners| used(&owners))
            .min();
        let answer = pack(&items, &bins);
        if let Some(owners) = &answer {
            assert!(fits(&items, &bins, owners), "{items:?} {bins:?} {owners:?}");
            assert!(owners.is_sorted());
            fitted += 1;
        } else {
            refused += 1;
        }
        assert_eq!(answer.as_ref().map(used), fewest, "{items:?} {bins:?}");
    }
    assert!(fitted > 500 && refused > 500, "{fitted} {refused}");
}

#[test]
fn pack_fills_the_first_of_equal_bins_and_passes_over_small_ones() {
    let packed = |items_: &[u64], bins_: &[u64]| pack(&items(items_), &bins(bins_));
    assert_eq!(packed(&[3, 3, 3], &[6, 6, 6]), Some(vec![0, 0, 1]));
    assert_eq!(packed(&[3, 3, 3], &[2, 9, 9]), Some(vec![1, 1, 1]));
    assert_eq!(packed(&[3, 3, 3], &[5, 5, 9]), Some(vec![2, 2, 2]));
    assert_eq!(packed(&[6, 3, 3], &[5, 6, 9]), Some(vec![1, 2, 2]));
    assert_eq!(packed(&[3, 3], &[5]), None);
    assert_eq!(packed(&[], &[]), Some(vec![]));
    assert_eq!(packed(&[0], &[]), None);
}

#[test]
fn no_equal_bin_stays_empty() {
    let mut random = Random(3);
    for _ in 0..500 {
        let count = 1 + random.below(40) as usize;
        let bytes: Vec<u64> = (0..count).map(|_| 1 + random.below(100)).collect();
        let bins = bins(&vec![10_000; 1 + random.below(8) as usize]);
        let items = items(&bytes);
        let owners = balance(&items, &bins).unwrap();
        let expected = bins.len().saturating_sub(count);
        assert_eq!(
            empty(&items, &bins, &owners),
            expected,
            "{bytes:?} {owners:?}"
        );
    }
}

#[test]
fn a_large_first_item_does_not_push_the_rest_onto_one_bin() {
    let owners = balance(
        &items(&[90, 10, 10, 10, 10, 10, 10]),
        &bins(&[100, 100, 100]),
    )
    .unwrap();
    assert_eq!(owners, [0, 1, 1, 1, 2, 2, 2]);
}

#[test]
fn unequal_bins_are_filled_in_proportion() {
    let owners = balance(&items(&[10; 12]), &bins(&[200, 100])).unwrap();
    assert_eq!(owners.iter().filter(|&&bin| bin == 0).count(), 8);
}

#[test]
fn sizes_beyond_64_bits_do_not_fit() {
    let huge = items(&[u64::MAX, u64::MAX]);
    assert_eq!(balance(&huge, &bins(&[u64::MAX])), None);
    assert_eq!(
        balance(&huge, &bins(&[u64::MAX, u64::MAX])),
        Some(vec![0, 1])
    );
    assert_eq!(best_fit(&huge, &bins(&[u64::MAX])), [Some(0), None]);
    let rounded = Bin {
        capacity: u64::MAX,
        reserve: 0,
        granularity: 1 << 21,
    };
    assert_eq!(balance(&huge[..1], &[rounded]), None);
}

#[test]
fn best_fit_finds_what_no_order_allows() {
    let (items, bins) = (items(&[6, 5, 4, 5]), bins(&[10, 10]));
    assert_eq!(fill(&items, &bins), [0, 1, 1]);
    let owners: Vec<usize> = best_fit(&items, &bins)
        .into_iter()
        .map(Option::unwrap)
        .collect();
    assert!(fits(&items, &bins, &owners));
}

#[test]
fn best_fit_never_overfills_and_gives_up_only_on_what_does_not_fit() {
    let mut random = Random(4);
    for _ in 0..2000 {
        let (items, bins) = case(&mut random);
        let owners = best_fit(&items, &bins);
        let mut held = vec![None; bins.len()];
        for (owner, &item) in owners.iter().zip(&items) {
            if let Some(bin) = *owner {
                held[bin] = plus(held[bin].unwrap_or_default(), item);
            }
        }
        let load = |b: usize| held[b].unwrap_or_default();
        for (b, bin) in bins.iter().enumerate() {
            if held[b].is_some() {
                assert!(bin.holds(load(b), bin.capacity));
            }
        }
        for (owner, &item) in owners.iter().zip(&items) {
            for (b, bin) in bins.iter().enumerate() {
                let with = plus(load(b), item).unwrap();
                let fits = bin.holds(with, bin.capacity);
                assert!(owner.is_some() || !fits, "{items:?} {bins:?}");
            }
        }
    }
}

#[test]
fn nothing_goes_anywhere() {
    assert_eq!(balance(&[], &bins(&[1, 2])), Some(vec![]));
    assert_eq!(balance(&[], &[]), Some(vec![]));
    assert_eq!(balance(&items(&[0]), &[]), None);
    assert_eq!(balance(&items(&[0]), &bins(&[0])), Some(vec![0]));
}
