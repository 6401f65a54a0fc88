//! The modules of a model, as far as the names of its tensors show them.
//!
//! ```
//! use tightfit_guest::tree::Tree;
//!
//! let tree = Tree::from_names([
//!     "model.norm.weight",
//!     "model.layers.0.mlp.up_proj.weight",
//!     "model.layers.0.mlp.up_proj.bias",
//! ]);
//! let layer = tree.find("model.layers.0").unwrap();
//! assert_eq!(tree.tensors_below(layer), [1, 2]);
//! let bytes = tree.sums(|module| tree.tensors(module).len() as u64);
//! assert_eq!(bytes[layer.index()], 2);
//! ```

use std::collections::BTreeMap;
use std::ops::AddAssign;

/// A module of a [`Tree`]. Numbers are given in the order of creation: a module's is larger than
/// its parent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(u32);

impl ModuleId {
    /// Its number, for lists with an entry per module.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Clone)]
struct Module<'a> {
    name: &'a str,
    parent: Option<ModuleId>,
    children: Vec<ModuleId>,
    tensors: Vec<u32>,
}

/// Modules and what they hold. Children and tensors are in the order in which they were added,
/// until [`Tree::sort_children`] changes it. Building one takes time in proportion to the names.
#[derive(Debug, Clone)]
pub struct Tree<'a> {
    modules: Vec<Module<'a>>,
    known: BTreeMap<(ModuleId, &'a str), ModuleId>,
    /// The modules on the way to the one that was asked for last: the next is mostly near.
    last: Vec<ModuleId>,
}

impl Default for Tree<'_> {
    fn default() -> Self {
        Tree::new()
    }
}

impl<'a> Tree<'a> {
    /// The module that all others are in. Its path is empty.
    pub const ROOT: ModuleId = ModuleId(0);

    /// Returns a tree of the root alone.
    pub fn new() -> Tree<'a> {
        let root = Module {
            name: "",
            parent: None,
            children: Vec::new(),
            tensors: Vec::new(),
        };
        Tree {
            modules: vec![root],
            known: BTreeMap::new(),
            last: Vec::new(),
        }
    }

    /// Returns the tree of these tensors, numbered from 0. The last component of a name is the
    /// tensor's own, what is before it are modules.
    pub fn from_names(names: impl IntoIterator<Item = &'a str>) -> Tree<'a> {
        let mut tree = Tree::new();
        for (tensor, name) in names.into_iter().enumerate() {
            let module = match name.rsplit_once('.') {
                Some((path, _)) => tree.module(path.split('.')),
                None => Tree::ROOT,
            };
            tree.add(module, tensor as u32);
        }
        tree
    }

    /// Returns the module with this path, made where it is missing.
    pub fn module(&mut self, path: impl IntoIterator<Item = &'a str>) -> ModuleId {
        let mut at = Tree::ROOT;
        for (depth, name) in path.into_iter().enumerate() {
            let near = self.last.get(depth).copied();
            at = match near {
                Some(near) if self.name(near) == name => near,
                _ => {
                    self.last.truncate(depth);
                    let child = self.child(at, name);
                    self.last.push(child);
                    child
                }
            };
        }
        at
    }

    /// Returns the child of this name, made where it is missing.
    pub fn child(&mut self, parent: ModuleId, name: &'a str) -> ModuleId {
        if let Some(&child) = self.known.get(&(parent, name)) {
            return child;
        }
        let child = ModuleId(self.modules.len() as u32);
        self.modules.push(Module {
            name,
            parent: Some(parent),
            children: Vec::new(),
            tensors: Vec::new(),
        });
        self.modules[parent.index()].children.push(child);
        self.known.insert((parent, name), child);
        child
    }

    /// Puts a tensor directly into a module.
    pub fn add(&mut self, module: ModuleId, tensor: u32) {
        self.modules[module.index()].tensors.push(tensor);
    }

    /// Returns the module with this path, if there is one. The empty path is the root's.
    pub fn find(&self, path: &str) -> Option<ModuleId> {
        if path.is_empty() {
            return Some(Tree::ROOT);
        }
        path.split('.')
            .try_fold(Tree::ROOT, |at, name| self.known.get(&(at, name)).copied())
    }

    /// Puts the children of every module in order of `key`, which is given the parent and the
    /// child. Those with the same key keep their order.
    pub fn sort_children<K: Ord>(&mut self, key: impl Fn(&Tree<'a>, ModuleId, ModuleId) -> K) {
        for module in 0..self.modules.len() {
            let mut children = std::mem::take(&mut self.modules[module].children);
            children.sort_by_cached_key(|&child| key(self, ModuleId(module as u32), child));
            self.modules[module].children = children;
        }
    }

    /// Returns the number of modules there are, the root among them.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Returns whether it holds no tensor and no module but the root.
    pub fn is_empty(&self) -> bool {
        self.modules.len() == 1 && self.modules[0].tensors.is_empty()
    }

    /// Returns every module, parents before their children.
    pub fn modules(&self) -> impl Iterator<Item = ModuleId> + use<> {
        (0..self.modules.len() as u32).map(ModuleId)
    }

    /// Returns the last component of a module's path.
    pub fn name(&self, module: ModuleId) -> &'a str {
        self.modules[module.index()].name
    }

    /// Returns the module that this one is a child of; none for the root.
    pub fn parent(&self, module: ModuleId) -> Option<ModuleId> {
        self.modules[module.index()].parent
    }

    /// Returns the modules directly in this one.
    pub fn children(&self, module: ModuleId) -> &[ModuleId] {
        &self.modules[module.index()].children
    }

    /// Returns the tensors directly in a module.
    pub fn tensors(&self, module: ModuleId) -> &[u32] {
        &self.modules[module.index()].tensors
    }

    /// Returns a module's path, as `model.layers.0`.
    pub fn path(&self, module: ModuleId) -> String {
        let mut names = Vec::new();
        let mut at = module;
        while let Some(parent) = self.parent(at) {
            names.push(self.name(at));
            at = parent;
        }
        names.reverse();
        names.join(".")
    }

    /// Returns every module below the root, a parent directly before its first child.
    pub fn in_order(&self) -> Vec<ModuleId> {
        self.below(Tree::ROOT)
    }

    /// Returns the tensors in a module and in all modules below it, in their order.
    pub fn tensors_below(&self, module: ModuleId) -> Vec<u32> {
        let below = self.below(module);
        let modules = std::iter::once(module).chain(below);
        modules
            .flat_map(|module| self.tensors(module).iter().copied())
            .collect()
    }

    /// For each module what `own` says of it, summed with those of all modules below it.
    pub fn sums<T: Copy + AddAssign>(&self, own: impl Fn(ModuleId) -> T) -> Vec<T> {
        let mut sums: Vec<T> = self.modules().map(own).collect();
        // Children have larger numbers than their parents.
        for module in (1..self.modules.len()).rev() {
            if let Some(parent) = self.modules[module].parent {
                let sum = sums[module];
                sums[parent.index()] += sum;
            }
        }
        sums
    }

    // With a list instead of recursion: a name can have more components than a stack has room.
    fn below(&self, module: ModuleId) -> Vec<ModuleId> {
        let mut found = Vec::new();
        let mut open: Vec<ModuleId> = self.children(module).iter().rev().copied().collect();
        while let Some(module) = open.pop() {
            found.push(module);
            open.extend(self.children(module).iter().rev());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 7] = [
        "model.layers.10.up.weight",
        "model.layers.2.up.weight",
        "model.layers.2.up.bias",
        "scale",
        "model.embed.weight",
        "model.layers.10.up.bias",
        "model.layers.weight",
    ];

    fn names(tree: &Tree<'_>, modules: &[ModuleId]) -> Vec<String> {
        modules.iter().map(|&module| tree.path(module)).collect()
    }

    #[test]
    fn names_become_modules_in_their_order() {
        let tree = Tree::from_names(NAMES);
        assert_eq!(
            names(&tree, &tree.in_order()),
            [
                "model",
                "model.layers",
                "model.layers.10",
                "model.layers.10.up",
                "model.layers.2",
                "model.layers.2.up",
                "model.embed"
            ]
        );
        assert_eq!((tree.len(), tree.is_empty()), (8, false));
        assert_eq!(tree.tensors(Tree::ROOT), [3]);
        let layers = tree.find("model.layers").unwrap();
        assert_eq!(tree.tensors(layers), [6]);
        assert_eq!(tree.tensors_below(layers), [6, 0, 5, 1, 2]);
        assert_eq!(tree.tensors_below(Tree::ROOT), [3, 6, 0, 5, 1, 2, 4]);
        assert_eq!(tree.parent(layers), tree.find("model"));
        assert_eq!(tree.name(layers), "layers");
        assert_eq!(tree.find(""), Some(Tree::ROOT));
        assert_eq!(tree.find("model.layer"), None);
        assert!(Tree::new().is_empty());
    }

    #[test]
    fn sums_go_into_every_ancestor() {
        let tree = Tree::from_names(NAMES);
        let sums: Vec<u64> =
            tree.sums(|module| tree.tensors(module).iter().map(|t| 1u64 << t).sum());
        let of = |path| sums[tree.find(path).unwrap().index()];
        assert_eq!(of(""), 0b111_1111);
        assert_eq!(of("model"), 0b111_0111);
        assert_eq!(of("model.layers"), 0b110_0111);
        assert_eq!(of("model.layers.2"), 0b000_0110);
        assert_eq!(of("model.embed"), 0b001_0000);
    }

    #[test]
    fn children_are_sorted_by_the_key_and_otherwise_keep_their_order() {
        let mut tree = Tree::from_names(NAMES);
        tree.sort_children(|tree, parent, child| {
            let number: u32 = tree.name(child).parse().unwrap_or(u32::MAX);
            (tree.name(parent) == "layers").then_some(number)
        });
        let layers = tree.find("model.layers").unwrap();
        let sorted = names(&tree, tree.children(layers));
        assert_eq!(sorted, ["model.layers.2", "model.layers.10"]);
        let model = tree.find("model").unwrap();
        let kept = names(&tree, tree.children(model));
        assert_eq!(kept, ["model.layers", "model.embed"]);
        assert_eq!(tree.tensors_below(layers), [6, 1, 2, 0, 5]);
    }

    #[test]
    fn going_up_and_coming_back_finds_the_same_module() {
        let mut tree = Tree::new();
        let deep = tree.module("a.b.c".split('.'));
        let up = tree.module("a".split('.'));
        let other = tree.module("a.x.c".split('.'));
        assert_ne!(deep, other);
        assert_eq!(tree.module("a.b.c".split('.')), deep);
        assert_eq!(tree.module("a".split('.')), up);
        assert_eq!(tree.module([]), Tree::ROOT);
        // Odd names are names.
        let empty = tree.module("a..b".split('.'));
        assert_eq!(tree.path(empty), "a..b");
    }

    #[test]
    fn a_name_of_very_many_components_is_no_problem() {
        let long = vec!["a"; 100_000].join(".");
        let tree = Tree::from_names([long.as_str()]);
        assert_eq!(tree.tensors_below(Tree::ROOT), [0]);
        assert_eq!(tree.sums(|_| 1u64)[0], 100_000);
    }
}
