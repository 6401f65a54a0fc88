//! How many core instances a component makes, counted before it is compiled: the compiler copies a
//! nested component for each time that it is instantiated, so a few lines can ask for billions.

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind,
    ComponentTypeRef, Encoding, Instance, Payload, Result,
};

/// A component or module whose parts are being read.
#[derive(Debug)]
struct Open {
    is_component: bool,
    instances: u64,
    /// Instances that each component in its index space makes.
    components: Vec<u64>,
}

/// Counts while a binary is read from front to back.
#[derive(Debug, Default)]
pub(super) struct Counter {
    open: Vec<Open>,
    /// Instances of what was closed last: in the end, of all.
    closed: u64,
    /// Whether components are handed around as values, so that only running it would tell.
    is_uncountable: bool,
}

impl Counter {
    /// How many components and modules have been begun and not ended.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// The count once everything is read. `None` where it cannot be told.
    pub(super) fn count(&self) -> Option<u64> {
        (!self.is_uncountable).then_some(self.closed)
    }

    /// Takes the next part. What is damaged beyond that is for validation to find.
    pub(super) fn read(&mut self, payload: &Payload<'_>) -> Result<()> {
        match payload {
            Payload::Version { encoding, .. } => self.open.push(Open {
                is_component: *encoding == Encoding::Component,
                instances: 0,
                components: Vec::new(),
            }),
            Payload::End(_) => {
                if let Some(closed) = self.open.pop() {
                    self.closed = closed.instances;
                    if closed.is_component {
                        self.push(Some(closed.instances));
                    }
                }
            }
            Payload::InstanceSection(section) => {
                for instance in section.clone() {
                    if let Instance::Instantiate { .. } = instance? {
                        self.add(Some(1));
                    }
                }
            }
            Payload::ComponentInstanceSection(section) => {
                for instance in section.clone() {
                    if let ComponentInstance::Instantiate {
                        component_index, ..
                    } = instance?
                    {
                        self.add(self.component(0, component_index));
                    }
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section.clone() {
                    match alias? {
                        ComponentAlias::Outer {
                            kind: ComponentOuterAliasKind::Component,
                            count,
                            index,
                        } => self.push(self.component(count, index)),
                        ComponentAlias::InstanceExport {
                            kind: ComponentExternalKind::Component,
                            ..
                        } => self.push(None),
                        _ => {}
                    }
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section.clone() {
                    if let ComponentTypeRef::Component(_) = import?.ty {
                        self.push(None);
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section.clone() {
                    let export = export?;
                    if export.kind == ComponentExternalKind::Component {
                        self.push(self.component(0, export.index));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Instances that a component makes which is in the index space of the one that many levels
    /// outside of the innermost.
    fn component(&self, outward: u32, index: u32) -> Option<u64> {
        let level = self.open.len().checked_sub(1 + outward as usize)?;
        self.open[level].components.get(index as usize).copied()
    }

    fn push(&mut self, instances: Option<u64>) {
        self.is_uncountable |= instances.is_none();
        if let Some(open) = self.open.last_mut() {
            open.components.push(instances.unwrap_or(0));
        }
    }

    fn add(&mut self, instances: Option<u64>) {
        self.is_uncountable |= instances.is_none();
        if let Some(open) = self.open.last_mut() {
            open.instances = open.instances.saturating_add(instances.unwrap_or(0));
        }
    }
}
